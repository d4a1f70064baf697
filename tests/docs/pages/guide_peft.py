"""docs/guide/peft.md, on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ...support.running import close, logits, token_ids, train
from ...support.tiny_models import llama, mixtral


def names(folder: Path) -> dict:
    pytest.importorskip("peft")
    return {
        **{name: llama() for name in ("model", "base")},
        "mixture": mixtral(),
        "batch": {"input_ids": token_ids(), "use_cache": False},
        "train": train,
    }


def check(names: dict, output: str, folder: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    import lora_kernels.peft
    from lora_kernels import load_adapter

    assert "LoRAM start of adapter 'default': 14 layers, s·B₀A₀ subtracted" in output
    assert "fused forward in 14 of 14 LoRA layers" in output
    assert "fused forward in 2 of 2 LoRA layers" in output  # the experts' two parameters
    # Disabled, the trained model is the base; saved, it is the same in plain PEFT and here.
    assert torch.equal(names["base_logits"], logits(llama()))
    want = logits(names["model"].eval())
    assert not close(want, names["base_logits"])
    assert close(logits(PeftModel.from_pretrained(llama(), "adapter").eval()), want)
    load_adapter(ours := llama(), "adapter", progress=False)
    assert close(logits(ours), want)
    # A later process gets A and B of rank 16 back to the bit.
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    later = get_peft_model(llama(), config)
    lora_kernels.peft.initialize(later, "loram", progress=False)
    later.load_adapter("adapter", "default")
    trained = {n: p for n, p in names["model"].named_parameters() if ".lora_" in n}
    assert len(trained) == 28 and all(
        torch.equal(later.get_parameter(name), p) for name, p in trained.items()
    )
    resumed = [p for n, p in names["resumed"].named_parameters() if ".lora_" in n]
    assert not any(map(torch.equal, resumed, trained.values()))
    # The model of experts computes what its base does.
    assert close(logits(names["experts"].eval()), logits(mixtral()))
    names["fused"].undo()
    names["start"].undo()
