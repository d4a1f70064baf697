"""LoRA+'s parameter groups."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, lora_plus_groups


def model(device="cpu") -> nn.Sequential:
    layers = [
        LoRALinear(12, 10, r=2, device=device),
        LoRALinear(10, 8, r=2, init_lora_weights="lora_xs", device=device),
        nn.LayerNorm(8, device=device),
        LoRALinear(8, 6, r=2, init_lora_weights="lora", device=device),
    ]
    layers[3].lora_A.requires_grad_(False)  # LoRA-FA
    return nn.Sequential(*layers)


def identities(group) -> set[int]:
    return {id(p) for p in group["params"]}


def test_groups(device):
    net = model(device)
    rest, factors_B = lora_plus_groups(net, 1e-4, 16, weight_decay=0.05, betas=(0.9, 0.95))
    assert identities(factors_B) == {id(net[0].lora_B), id(net[3].lora_B)}
    norm = net[2]
    want = {id(p) for p in (net[0].lora_A, net[1].lora_R, norm.weight, norm.bias)}
    assert identities(rest) == want
    assert rest["lr"] == 1e-4 and factors_B["lr"] == pytest.approx(1.6e-3)
    for group in (rest, factors_B):
        assert group["weight_decay"] == 0.05 and group["betas"] == (0.9, 0.95)
    torch.optim.AdamW([rest, factors_B])


def test_b_moves_ratio_times_as_far(device):
    """A first step of Adam is lr · sign(g)."""
    net = nn.Sequential(LoRALinear(12, 10, r=2, device=device))
    before = [p.detach().clone() for p in (net[0].lora_A, net[0].lora_B)]
    optimizer = torch.optim.Adam(lora_plus_groups(net, 1e-3, 8), eps=0)
    net(torch.randn(5, 12).to(device)).square().sum().backward()
    optimizer.step()
    for p, was, lr in zip((net[0].lora_A, net[0].lora_B), before, (1e-3, 8e-3), strict=True):
        torch.testing.assert_close((p - was).abs(), torch.full_like(p, lr), rtol=1e-3, atol=1e-6)


def test_shared_and_twice_used(device):
    layer = LoRALinear(8, 8, r=2, device=device)
    other = LoRALinear(8, 8, r=2, device=device)
    other.lora_B = layer.lora_B
    groups = lora_plus_groups(nn.ModuleList([layer, other, layer]), 1e-3)
    assert [len(g["params"]) for g in groups] == [2, 1]


def test_a_group_that_would_be_empty_is_left_out(device):
    only_R = LoRALinear(8, 8, r=2, init_lora_weights="lora_xs", device=device)
    assert [g["lr"] for g in lora_plus_groups(only_R, 1e-3, 4)] == [1e-3]
    only_B = LoRALinear(8, 8, r=2, device=device)
    only_B.lora_A.requires_grad_(False)
    assert [g["lr"] for g in lora_plus_groups(only_B, 1e-3, 4)] == [4e-3]


def test_peft_s_names(device):
    peft = pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(8, 8))
    net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
    layer = net.base_model.model[0]
    rest, factors_B = lora_plus_groups(net, 1e-3)
    assert identities(factors_B) == {id(layer.lora_B["default"].weight)}
    assert identities(rest) == {id(layer.lora_A["default"].weight)}


@pytest.mark.parametrize(
    "lr,ratio,error,match",
    [
        (0.0, 16, ValueError, "lr must be positive"),
        (math.nan, 16, ValueError, "lr must be positive"),
        ("1e-4", 16, TypeError, "lr must be a number"),
        (1e-4, -1, ValueError, "ratio must be positive"),
        (1e-4, math.inf, ValueError, "ratio must be positive"),
    ],
)
def test_bad_numbers(lr, ratio, error, match):
    with pytest.raises(error, match=match):
        lora_plus_groups(model(), lr, ratio)


def test_params_are_no_option():
    with pytest.raises(TypeError, match="params is not an option"):
        lora_plus_groups(model(), 1e-3, params=[])


def test_nothing_trains():
    with pytest.raises(ValueError, match="no parameter that trains"):
        lora_plus_groups(nn.Linear(4, 4).requires_grad_(False), 1e-3)
