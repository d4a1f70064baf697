"""`initialize` on quantized bases, which cannot be rewritten."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from lora_kernels.layers.base import base_of

from ..support.packages import needs_bitsandbytes, needs_peft, needs_torchao
from ..support.peft_models import accelerate, adapted, float64, initialize, linear_layers, update_of
from ..support.quantized import linear_4bit, linear_8bit
from ..support.running import close, logits, move
from ..support.tiny_models import llama


def bnb_4bit(model: nn.Module) -> nn.Module:
    replace(model, partial(linear_4bit, nested=True))
    model.is_loaded_in_4bit = True
    return model


def bnb_8bit(model: nn.Module) -> nn.Module:
    replace(model, linear_8bit)
    model.is_loaded_in_8bit = True
    return model


def torchao_int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model


def replace(model: nn.Module, quantize: Callable) -> None:
    """Quantize every linear layer of the blocks."""
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            model.model.layers.set_submodule(name, quantize(layer))


QUANTIZED = [
    pytest.param(bnb_4bit, marks=needs_bitsandbytes),
    pytest.param(bnb_8bit, marks=needs_bitsandbytes),
    pytest.param(torchao_int8, marks=needs_torchao),
]


@needs_peft
@pytest.mark.parametrize("method", ["loram", "pissa"])
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_quantized_base(quantize, method):
    model = adapted(quantize(llama(hidden_size=64, intermediate_size=128)))
    with model.disable_adapter():
        base = logits(model)
    report = initialize(model, method)
    assert len(report.layers) == 14
    assert torch.equal(logits(model), base)
    assert not accelerate(model).layers
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    move(model)
    x = torch.randn(5, layer.in_features)
    got = layer(x) - layer.get_base_layer()(x)
    assert close(got, torch.tensor(float64(x) @ update_of(layer).T), 1024)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@needs_peft
@pytest.mark.parametrize("quantize", QUANTIZED)
def test_the_start_is_that_of_the_dequantized_weight(quantize):
    from lora_kernels.init import LoRAM

    model = adapted(quantize(llama(hidden_size=64, intermediate_size=128)))
    initialize(model, "loram")
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    start = LoRAM()(base_of(layer.get_base_layer()).weight(), 4)
    assert torch.equal(layer.lora_A["default"].weight, start.lora_A)


@needs_peft
@needs_bitsandbytes
@pytest.mark.parametrize("quantize", [bnb_4bit, bnb_8bit])
def test_merge_gives_what_peft_merges(quantize):
    """W + s·(BA − B₀A₀), quantized again: PEFT's error is the quantizer's."""
    model = adapted(quantize(llama(hidden_size=64, intermediate_size=128)))
    initialize(model, "loram")
    move(model, 0.001)
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    want = float64(base_of(layer.get_base_layer()).weight()) + update_of(layer)
    layer.merge()
    got = float64(base_of(layer.get_base_layer()).weight())
    # Half a step between two of nf4's values is 15 % of the block's largest, of int8's 0.4 %.
    step = 0.16 if quantize is bnb_4bit else 0.005
    assert abs(got - want).max() <= step * abs(want).max()
