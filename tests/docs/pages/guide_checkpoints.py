"""docs/guide/checkpoints.md, with a tiny model in the place of Llama-3-8B."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from lora_kernels.cli import main

from ...support.running import close, logits, train
from ...support.tiny_models import llama

BASE = "models/Llama-3-8B"


def names(folder: Path) -> dict:
    for package in ("peft", "rich", "gguf"):
        pytest.importorskip(package)
    llama().save_pretrained(folder / BASE)
    return {"train": train}


def in_peft(base: str, adapter: str) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    return logits(PeftModel.from_pretrained(model, adapter).eval())


def check(names: dict, output: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, trained = logits(llama()), logits(names["model"].eval())
    assert not close(trained, base)
    # The residual base with its start is the original model, and without it another one.
    assert close(in_peft("start", "start/adapter"), base)
    residual = AutoModelForCausalLM.from_pretrained("start")
    assert not close(logits(residual.eval()), base)
    # The converted adapter, on the original base, is what was trained, and so is the merged model.
    assert close(in_peft(BASE, "adapter"), trained)
    assert close(logits(AutoModelForCausalLM.from_pretrained("merged").eval()), trained)
    lost = in_peft(BASE, "small") - trained  # by the truncated rank
    assert 0 < float(lost.norm()) < 0.5 * float((trained - base).norm())
    assert (folder / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    assert len((folder / "magnitudes.csv").read_text().splitlines()) == 1 + 14
    assert "14 layers start with loram, r = 16" in output and "WRONG" not in output
    assert not close(logits(names["original"].eval()), base)
    # An adapter of the residual base is refused on the original one.
    assert main(["merge", BASE, "trained", "wrong"]) == 1
