"""docs/guide/serving.md, with a tiny model in the place of Llama-3-8B."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from lora_kernels import LoRAConfig

from ...support.running import close, logits, quiet, train
from ...support.tiny_models import llama

BASE = "models/Llama-3-8B"


def names(folder: Path) -> dict:
    for package in ("peft", "rich", "gguf"):
        pytest.importorskip(package)
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(folder / BASE)
    model = AutoModelForCausalLM.from_pretrained(folder / BASE)
    # What engines read in different ways: rsLoRA and two ranks.
    options = {"rank_pattern": {"q_proj": 8}, "use_rslora": True, "lora_alpha": 12}
    quiet(model, LoRAConfig(r=16, **options))
    train(model)
    return {"model": model.eval()}


def check(names: dict, output: str, folder: Path) -> None:
    from peft import PeftModel

    want = logits(names["model"])
    assert close(logits(PeftModel.from_pretrained(llama(), folder / "adapter").eval()), want)
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 32 and not config["use_rslora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert "truncated in rank and rounded to bfloat16 with a relative error" in output
    # The verdicts of `check` on both engines.
    assert "14 of 14 right" in output and "--max-lora-rank 32" in output
    assert (folder / "adapter.gguf").read_bytes()[:4] == b"GGUF"
    with safe_open(folder / "renamed/adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)
