from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch

from lora_kernels import LoRALinear
from lora_kernels.init import (
    Initializer,
    LoRA,
    LoRAM,
    Start,
    get_initializer,
    initializer_names,
    register_initializer,
    registry,
)


def test_names():
    assert {"lora", "loram"} <= set(initializer_names())
    assert get_initializer("LoRAM") == LoRAM()
    assert get_initializer(LoRA(seed=1)) == LoRA(seed=1)


def test_a_user_registers_one(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @dataclass(frozen=True)
    class Halves(Initializer):
        changes_base = False

        def __call__(self, weight, r):
            return Start(torch.full((r, weight.shape[1]), 0.5), torch.zeros(weight.shape[0], r))

    register_initializer("Halves", Halves)
    layer = LoRALinear(6, 4, r=2, init_lora_weights="halves")
    assert (layer.lora_A == 0.5).all()
    with pytest.raises(ValueError, match="taken"):
        register_initializer("halves", Halves)


def test_options_are_frozen():
    with pytest.raises(FrozenInstanceError):
        LoRA(seed=1).seed = 2


def test_typo():
    with pytest.raises(ValueError, match="did you mean 'loram'"):
        get_initializer("loran-m")
