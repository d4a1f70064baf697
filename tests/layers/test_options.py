"""The rules for s, the constructor's spellings of them, and starts that do not allow LoRA-α."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.init import LoRAM, get_initializer, initializer_names
from lora_kernels.layers.options import RULES, lora_scaling

from ..support.running import layer_data

ZERO = {"init_lora_weights": "lora"}


@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize(
    "options,want",
    [
        ({}, lambda r: 8 / r),
        ({"lora_alpha": 16}, lambda r: 16 / r),
        ({"scaling": "lora", "lora_alpha": 16}, lambda r: 16 / r),
        ({"use_rslora": True, "lora_alpha": 16}, lambda r: 16 / math.sqrt(r)),
        ({"scaling": "rslora", "lora_alpha": 16}, lambda r: 16 / math.sqrt(r)),
        ({"scaling": "RsLoRA", "lora_alpha": 16}, lambda r: 16 / math.sqrt(r)),
        ({"scaling": "rslora", "use_rslora": True}, lambda r: 8 / math.sqrt(r)),
        ({"scaling": "alpha_sqrt"}, lambda r: (256 * math.sqrt(r)) / r),  # α* = C√r
        ({"scaling": "alpha_sqrt", "lora_alpha": 64}, lambda r: 64 / math.sqrt(r)),
    ],
)
def test_rules(options, want, r, device):
    layer = LoRALinear.from_linear(nn.Linear(70, 80).to(device), r=r, **ZERO, **options)
    assert layer.scaling == pytest.approx(want(r), rel=1e-15) and type(layer.scaling) is float
    built = LoRALinear(70, 80, r=r, device=device, **ZERO, **options)
    assert built.scaling == layer.scaling and built.scaling_rule in RULES
    x = torch.randn(3, 70).to(device)
    with torch.no_grad():
        layer.lora_B.normal_()
        added = x @ layer.lora_A.T @ layer.lora_B.T
        got = layer(x) - nn.functional.linear(x, layer.weight, layer.bias)
    # Float32 sums of r and of 70 products, and of the base, whose digits the difference has lost.
    noise = 1e-4 * float(added.abs().max())
    torch.testing.assert_close(got, want(r) * added, rtol=1e-4, atol=noise)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"scaling": "alpha"}, "unknown scaling 'alpha': .*lora, rslora, alpha_sqrt"),
        ({"scaling": "rs_lora"}, "did you mean 'rslora'"),
        ({"scaling": "alpha_sqrt", "use_rslora": True}, "use_rslora=True is .*'alpha_sqrt'"),
        ({"scaling": "lora", "use_rslora": True}, "use_rslora=True is .*'lora' is asked for"),
        ({"scaling": "alpha_sqrt", "lora_alpha": 0}, "lora_alpha must be positive"),
    ],
)
def test_bad(options, match, device):
    linear = nn.Linear(8, 8).to(device)
    with pytest.raises(ValueError, match=match):
        LoRALinear.from_linear(linear, r=2, **ZERO, **options)
    with pytest.raises(ValueError, match=match):
        LoRALinear(8, 8, r=2, device=device, **ZERO, **options)
    assert linear.weight.requires_grad


@pytest.mark.parametrize("value", [2.0, True, ["lora"]])
def test_the_number_is_no_rule(value):
    """The layer's attribute `scaling` is the number s; the argument of that name is the rule."""
    with pytest.raises(TypeError, match=r"name of a rule, lora, .*follows from lora_alpha"):
        LoRALinear(8, 8, r=2, scaling=value)


# Zero, or divided by s, or (LoRA-XS) a hundred-thousandth.
FIT = {
    *("lora", "init_b", "gaussian", "orthogonal", "mica", "eva"),
    *("pissa", "milora", "kasa", "corda", "lora_null", "loftq", "qera"),
    *("lora_xs", "lora_sb"),
}


@pytest.mark.parametrize("initializer", [*initializer_names(), LoRAM(track="pissa")], ids=str)
@pytest.mark.parametrize("residual", ["absorb", "implicit"])
def test_alpha_sqrt_and_the_start(initializer, residual, device):
    """If s·B₀A₀ grows with s, an error says what to do instead; otherwise the layer starts as its
    base.
    """
    linear = nn.Linear(200, 160).to(device)
    original, before = nn.Linear(200, 160).to(device), linear.weight.detach().clone()
    original.load_state_dict(linear.state_dict())
    options = {
        "r": 16,
        "scaling": "alpha_sqrt",
        "init_lora_weights": initializer,
        "residual": residual,
        **layer_data(get_initializer(initializer), before),
    }
    if initializer not in FIT and initializer != LoRAM(track="pissa"):
        with pytest.raises(ValueError, match=r"by s = 64: s·B₀A₀ would dwarf .*'lora', 'gaussian'"):
            LoRALinear.from_linear(linear, **options)
        assert torch.equal(linear.weight, before) and linear.weight.requires_grad
        return
    if get_initializer(initializer).rewrites_base and residual == "implicit":
        with pytest.raises(ValueError, match=r"(LoftQ|QERA).* and residual='absorb'"):
            LoRALinear.from_linear(linear, **options)
        assert torch.equal(linear.weight, before) and linear.weight.requires_grad
        return
    layer = LoRALinear.from_linear(linear, **options)
    x = torch.randn(4, 200).to(device)
    y = original(x)
    # LoRA-XS starts with s · 1e-5 of W: 64e-5; LoftQ and QERA with 4 bits of it, less what A and B
    # make up for; KaSA without its 16 smallest components; the others with float32's rounding.
    room = {"lora_xs": 5e-3, "loftq": 0.1, "qera": 0.1, "kasa": 0.1}.get(initializer, 1e-4)
    assert (layer(x) - y).norm() <= room * y.norm()


def test_plain_function():
    assert lora_scaling(16, 4) == 4.0 and lora_scaling(16, 4, "rslora") == 8.0
    assert lora_scaling(256, 16, "alpha_sqrt") == 64.0
    with pytest.raises(ValueError, match=r"unknown rule 'rs_lora': .*did you mean 'rslora'"):
        lora_scaling(16, 4, "rs_lora")
    with pytest.raises(ValueError, match="unknown rule False"):
        lora_scaling(16, 4, False)
    for bad, error in ((math.nan, ValueError), ("16", TypeError), (True, TypeError)):
        with pytest.raises(error, match="lora_alpha must be"):
            lora_scaling(bad, 4)


def test_another_rule_does_not_load(device):
    layer = LoRALinear.from_linear(nn.Linear(48, 40).to(device), r=4)
    other = LoRALinear(48, 40, r=4, use_rslora=True, device=device)
    with pytest.raises(ValueError, match="same r, lora_alpha and scaling rule"):
        other.load_state_dict(layer.state_dict())
