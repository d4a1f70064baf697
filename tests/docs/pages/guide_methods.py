"""docs/guide/methods.md on a tiny model."""

from __future__ import annotations

from pathlib import Path

import torch

from ...support.tiny_models import llama


def names(folder: Path) -> dict:
    model = llama()
    ids = torch.randint(model.config.vocab_size, (3, 12))
    batches = [{"input_ids": ids.flip(0), "labels": ids.flip(0)}] * 2

    def train(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        model.train()(**batches[0]).loss.backward()
        optimizer.step()

    return {"model": model, "batches": batches, "ids": ids, "train": train}


def check(names: dict, output: str, folder: Path) -> None:
    assert "adapter 'default'" in output
    content = (folder / "dora/adapter_model.safetensors").read_text(errors="ignore")
    assert "lora_magnitude_vector" in content
    model, ids = names["model"], names["ids"]
    for row, name in enumerate(("french", None, "german")):
        with torch.no_grad(), names["adapters_per_row"](model, [name]):
            assert torch.equal(model(input_ids=ids[row : row + 1]).logits[0], names["logits"][row])
