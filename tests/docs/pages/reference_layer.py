"""docs/reference/layer.md on a small linear layer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def names(folder: Path) -> dict:
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    return {"linear": linear, "before": linear.weight.detach().clone()}


def check(names: dict, output: str, folder: Path) -> None:
    layer, before = names["layer"], names["before"]
    assert type(names["merged"]) is type(names["original"]) is nn.Linear
    assert layer.weight.data_ptr() == names["linear"].weight.data_ptr()
    assert not torch.equal(layer.weight, before)  # s·B₀A₀ was subtracted
    torch.testing.assert_close(names["merged"].weight, before)  # it is not trained yet
    torch.testing.assert_close(names["original"].weight, before)
    x = torch.randn(3, 48)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, before, layer.bias))
