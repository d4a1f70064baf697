"""Convolutions and attentions that `lora_kernels.peft` saved, read by `load_adapter`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import load_adapter

from ..support.packages import needs_peft
from ..support.peft_models import adapted, initialize
from ..support.running import move

pytestmark = needs_peft


class Net(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, groups=groups, padding=1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)
        self.config = {"model_type": "custom"}

    def forward(self, x):
        x = self.conv(x).mT
        return self.out(self.attn(x, x, x)[0])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_bias": True}], ids=str)
def test_are_read_as_trained(options, tmp_path):
    torch.manual_seed(0)
    base, x = Net(), torch.randn(2, 4, 5)
    targets = ["conv", "out"] if options else ["conv", "attn", "out"]
    model = adapted(copy.deepcopy(base), target_modules=targets, r=3, lora_alpha=5, **options)
    initialize(model, "loram")
    move(model)
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(base)
    load_adapter(other, tmp_path, progress=False)
    with torch.no_grad():
        y, got = model.eval()(x), other.eval()(x)
    assert (got - y).abs().max() <= 1e-5 * y.abs().max()
    layer, ours = model.base_model.model.conv, other.conv
    assert torch.equal(ours.lora_A, layer.lora_A["default"].weight.flatten(1))
    assert torch.equal(ours.lora_B, layer.lora_B["default"].weight.flatten(1))
    assert ours.scaling == pytest.approx(layer.scaling["default"])
    assert torch.equal(other.out.lora_B, model.base_model.model.out.lora_B["default"].weight)


def test_with_groups_are_not_read(tmp_path):
    base = Net(groups=2)
    model = adapted(copy.deepcopy(base), target_modules=["conv", "out"], r=2)
    initialize(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"conv: .* not read here, such as .*with groups"):
        load_adapter(base, tmp_path)
