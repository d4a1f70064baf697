"""`initialize` on bases that cannot be rewritten: FACTS 8."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lora_kernels.layers.base import base_of

from ..support.packages import needs_peft
from .models import adapted, close, linear_layers, llama, logits, move
from .test_accelerate import accelerate
from .test_initialize import float64, initialize, update_of


def _needs(package: str):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs the package {package}")


def bnb_4bit(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    replace(model, lambda i, o: bnb.nn.Linear4bit(i, o, bias=False, quant_type="nf4"))
    model.is_loaded_in_4bit = True
    return model


def bnb_8bit(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    replace(model, lambda i, o: bnb.nn.Linear8bitLt(i, o, bias=False, has_fp16_weights=False))
    model.is_loaded_in_8bit = True
    return model


def torchao_int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model.model.layers, Int8WeightOnlyConfig())
    return model


def replace(model: nn.Module, make) -> None:
    """Every linear layer of the blocks by a quantised one of the same weight."""
    for name, layer in list(model.model.layers.named_modules()):
        if isinstance(layer, nn.Linear):
            new = make(layer.in_features, layer.out_features)
            new.load_state_dict({"weight": layer.weight.detach()})
            model.model.layers.set_submodule(name, new.to("cpu"))


QUANTISED = [
    pytest.param(bnb_4bit, marks=_needs("bitsandbytes")),
    pytest.param(bnb_8bit, marks=_needs("bitsandbytes")),
    pytest.param(torchao_int8, marks=_needs("torchao")),
]


@needs_peft
@pytest.mark.parametrize("method", ["loram", "pissa"])
@pytest.mark.parametrize("quantise", QUANTISED)
def test_quantised_base(quantise, method):
    model = adapted(quantise(llama(intermediate_size=128)))
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
@pytest.mark.parametrize("quantise", QUANTISED)
def test_the_start_is_that_of_the_dequantised_weight(quantise):
    from lora_kernels.init import LoRAM

    model = adapted(quantise(llama(intermediate_size=128)))
    initialize(model, "loram")
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    start = LoRAM()(base_of(layer.get_base_layer()).weight(), 4)
    assert torch.equal(layer.lora_A["default"].weight, start.lora_A)


@needs_peft
@_needs("bitsandbytes")
@pytest.mark.parametrize("quantise", [bnb_4bit, bnb_8bit])
def test_merge_gives_what_peft_merges(quantise):
    """W + s·(BA − B₀A₀), quantised again: PEFT's error is the quantiser's."""
    model = adapted(quantise(llama(intermediate_size=128)))
    initialize(model, "loram")
    move(model, 0.001)
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"]
    want = float64(base_of(layer.get_base_layer()).weight()) + update_of(layer)
    layer.merge()
    got = float64(base_of(layer.get_base_layer()).weight())
    # Half a step between two of nf4's values is 15 % of the block's largest, of int8's 0.4 %.
    step = 0.16 if quantise is bnb_4bit else 0.005
    assert abs(got - want).max() <= step * abs(want).max()
