"""docs/guide/quantized.md, with a tiny model in the place of Llama-3-8B."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import disable_adapters, load_adapter
from lora_kernels.layers.base import base_of
from lora_kernels.model.install import adapted_layers

from ...support.running import logits, token_ids, train
from ...support.tiny_models import llama


def names(folder: Path) -> dict:
    pytest.importorskip("bitsandbytes")
    llama(hidden_size=64, intermediate_size=128).save_pretrained(folder / "models/Llama-3-8B")
    ids = token_ids()
    return {"train": train, "batches": [{"input_ids": ids, "labels": ids}] * 2}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """W + s·BA of the adapted layers, without what is subtracted."""
    found = {}
    for name, layer in adapted_layers(model).items():
        base = base_of(getattr(layer, "base_layer", layer)).weight().float()
        found[name] = base + layer.scaling * layer.lora_B @ layer.lora_A
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def check(names: dict, output: str, folder: Path) -> None:
    load, path = names["load_4_bit"], "models/Llama-3-8B"
    assert "14 layers" in output and "implicit" in output
    # The adapter is one of the quantized base; off, it is the base to the bit.
    base = load(path)
    want = logits(base)
    load_adapter(base, "adapter", progress=False)
    assert distance(logits(base), want) > 1e-2
    with disable_adapters(base):
        assert torch.equal(logits(base), want)
    # Both ways to merge: plain layers with the update.
    assert distance(logits(names["whole"].eval()), logits(base)) < 0.2
    assert not adapted_layers(names["whole"])

    # LoftQ and QERA begin closer to the original weights than the quantized model is.
    original = llama(hidden_size=64, intermediate_size=128)
    quantized = load(path)
    for adapted in ("quantized", "other"):
        for name, weight in weights(names[adapted]).items():
            W = original.get_submodule(name).weight
            Q = base_of(quantized.get_submodule(name)).weight().float()
            assert distance(weight.detach(), W) < 0.9 * distance(Q, W), name
    # The base that LoftQ made loads in 4 bits to the same values.
    for name, layer in adapted_layers(names["served"]).items():
        stored = base_of(layer.base_layer).weight().bfloat16()
        assert torch.equal(stored, names["model"].get_submodule(name).weight)
    assert distance(logits(names["served"]), logits(names["model"].eval())) < 2e-2
