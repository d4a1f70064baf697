"""Rules over PEFT's layers, and LoRA-FA against PEFT's own optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import optim

from . import cases

peft = pytest.importorskip("peft")
RULES = {
    "lora_pro": (optim.LoRAPro(), cases.lora_pro),
    "riemannian": (optim.Riemannian(), cases.riemannian),
    "lora_fa": (optim.LoRAFA(), cases.lora_fa),
}


class Mixed(nn.Module):
    """An embedding, a linear layer and a convolution."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 6, 3)

    def forward(self, ids):
        return self.conv(self.fc(self.embed(ids)).mT)


def adapted(**options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=4, **options)
    model = peft.get_peft_model(Mixed(), config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dora", [False, True])
def test_linear_embedding_and_convolution(name, dora):
    model = adapted(target_modules=["embed", "fc", "conv"], use_dora=dora)
    inner = model.base_model.model
    factors = [
        (inner.embed.lora_embedding_A["default"], inner.embed.lora_embedding_B["default"]),
        *((m.lora_A["default"].weight, m.lora_B["default"].weight) for m in (inner.fc, inner.conv)),
    ]
    model(torch.arange(10).view(2, 5)).square().mean().backward()
    want = []
    for A, B in factors:
        parts = [cases.as_float64(t.flatten(1)) for t in (A, B, A.grad, B.grad)]
        want.append(RULES[name][1](parts[0], parts[1], 4 / 3, *parts[2:]))
    optim.precondition_gradients_(model, RULES[name][0])
    for (A, B), (grad_A, grad_B) in zip(factors, want, strict=True):
        assert B.grad.shape == B.shape
        cases.assert_close(cases.as_float64(B.grad.flatten(1)), grad_B, condition=100)
        if name == "lora_fa":
            assert A.grad is None
        else:
            cases.assert_close(cases.as_float64(A.grad.flatten(1)), grad_A, condition=100)


def test_lora_fa_is_peft_s_optimizer(monkeypatch):
    """With Adam's ε of 0, which the two place differently, and PEFT's product not in bfloat16."""
    lorafa = pytest.importorskip("peft.optimizers.lorafa")
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    models = [adapted(target_modules=["fc"]) for _ in range(2)]
    theirs = lorafa.create_lorafa_optimizer(models[0], r=3, lora_alpha=4, lr=1e-2)
    theirs.param_groups[0]["eps"] = 0.0
    ours = torch.optim.AdamW(models[1].parameters(), lr=1e-2, eps=0.0, weight_decay=0.0)
    optim.lora_fa(models[1], ours)
    for _ in range(3):
        for model, optimizer in zip(models, (theirs, ours), strict=True):
            optimizer.zero_grad()
            model(torch.arange(10).view(2, 5)).square().mean().backward()
            optimizer.step()
    got, want = (dict(model.named_parameters()) for model in reversed(models))
    for name, parameter in want.items():
        torch.testing.assert_close(got[name], parameter, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_that_are_not_active_are_left_alone():
    model = adapted(target_modules=["fc"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["fc"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    optim.lora_pro(model, optimizer)
    model(torch.arange(10).view(2, 5)).square().mean().backward()
    before = model.base_model.model.fc.lora_B["default"].weight.grad.clone()
    optimizer.step()
    layer = model.base_model.model.fc
    assert layer.lora_B["other"].weight.grad is None
    assert not np.allclose(layer.lora_B["default"].weight.grad, before)


def refused(net, match, **options) -> None:
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, **options))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=match):
        optim.lora_pro(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
def test_a_convolution_with_groups():
    net = Mixed()
    net.conv = nn.Conv1d(8, 6, 3, groups=2)
    refused(net, "'base_model.model.conv': its convolution has groups", target_modules=["conv"])


@pytest.mark.skipif(not hasattr(peft, "BdLoraConfig"), reason="an older PEFT")
def test_a_variant_of_another_update():
    options = {"use_bdlora": peft.BdLoraConfig(target_modules_bd_a=["fc"], nblocks=2)}
    refused(
        Mixed(),
        "the update of PEFT's BdLoraLinearVariant is not s·BA",
        target_modules=["fc"],
        **options,
    )


def test_a_frozen_factor():
    model = adapted(target_modules=["fc"])
    model.base_model.model.fc.lora_B.requires_grad_(False)
    with pytest.raises(ValueError, match="its B is frozen"):
        optim.riemannian(model, torch.optim.SGD(model.parameters(), lr=1))
