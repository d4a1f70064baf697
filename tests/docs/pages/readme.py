"""README.md, on the real model: a folder with the name that the hub has for it."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from benchmarks.common import smollm2


def names(folder):
    cached = smollm2.load_tokenizer().name_or_path
    for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "models/SmolLM2-135M"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).symlink_to(cached, target_is_directory=True)
    return {}


def check(names, output, folder):
    assert "adapter 'default': 210 layers" in output
    prompt = {key: names["batch"][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        trained = names["model"](**prompt).logits
        served = names["served"](**prompt).logits
    assert (trained - served).norm() <= 1e-5 * trained.norm()
    assert "fused forward in 210 of 210 LoRA layers" in output
    with torch.no_grad():
        untouched = names["peft_model"](**prompt).logits
    with torch.no_grad(), names["peft_model"].disable_adapter():
        base = names["peft_model"](**prompt).logits
    assert (untouched - base).norm() <= 1e-5 * base.norm()  # the start is subtracted
    assert (served - base).norm() > 0.05 * base.norm()  # ten steps have changed the model
    merged = load_file(folder / "merged" / "model.safetensors")
    assert merged["model.layers.0.mlp.up_proj.weight"].shape == (1536, 576)
