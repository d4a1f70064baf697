"""docs/guide/magnitudes.md on a tiny model and its checkpoint, and with a tiny adapter."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from lora_kernels import LoRAConfig, add_lora, save_adapter

from ...support.running import logits
from ...support.tiny_models import llama


def names(folder: Path) -> dict:
    for package in ("rich", "matplotlib"):
        pytest.importorskip(package)
    model = llama()
    model.save_pretrained(folder / "models/SmolLM2-135M")
    adapted = llama()
    add_lora(adapted, LoRAConfig(r=4))
    save_adapter(adapted, folder / "runs/adapter")

    def train(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        _steps(model, torch.optim.AdamW(trained, lr=1e-3))

    return {"model": model, "train": train}


def check(names: dict, output: str, folder: Path) -> None:
    found = {row["name"]: row for row in csv.DictReader((folder / "magnitudes.csv").open())}
    rows = {row.name: row for row in names["rows"]}
    assert found.keys() == rows.keys() and len(rows) == 14
    for name, row in found.items():
        assert float(row["gain"]) == pytest.approx(rows[name].gain, rel=1e-5)
    for title in ("ν[W]", "ρ[r]", "log Q", "k₁ loram", "ν[sBA]", "median"):
        assert title in output, title
    assert (folder / "magnitudes.png").stat().st_size > 1000
    # An adapter that was not trained has no update, although A and B are not zero.
    adapter = list(csv.DictReader((folder / "adapter.csv").open()))
    assert all(float(row["norm_update"]) < 1e-5 < float(row["nu_A"]) for row in adapter)
    assert output.count("ν[ΔW] / ν[W]") == 14
    # Both setups train alike.
    plain = llama()
    setup = names["setup"]
    add_lora(plain, LoRAConfig(r=8, lora_alpha=setup.lora_alpha))
    _steps(plain, torch.optim.AdamW(setup.groups(plain)))
    _steps(names["model"], names["optimizer"])
    torch.testing.assert_close(logits(names["model"]), logits(plain), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits(llama()), logits(plain), rtol=1e-2, atol=1e-2)


def _steps(model, optimizer) -> None:
    ids = torch.arange(2 * 12).view(2, 12)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
