"""What a rule refuses, by name, before anything is changed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora, lora_plus_groups, optim
from lora_kernels.training.rules import blocks

from ...support.ranks import needs_ranks, on_ranks
from . import cases

RULES = [optim.lora_pro, optim.riemannian, optim.lora_fa]
each_rule = pytest.mark.parametrize("attach", RULES)


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def refused(attach, model, match, error=ValueError) -> None:
    optimizer = sgd(model)
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=match):
        attach(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert trained == [p.requires_grad for p in model.parameters()]


@each_rule
def test_an_R(attach):
    model = nn.ModuleDict({"q": LoRALinear(8, 8, r=2, init_lora_weights="lora_xs")})
    refused(attach, model, r"does not fit the layer 'q'.*R between A and B \(LoRA-XS, LoRA-SB\)")


@each_rule
def test_a_diagonal(attach):
    model = nn.ModuleDict({"q": LoRALinear(8, 8, r=2, init_lora_weights="kasa")})
    refused(attach, model, r"the layer 'q': its update is B·diag\(λ\)·A \(KaSA\)")


@each_rule
def test_a_frozen_B(attach):
    model = nn.Sequential(LoRALinear(8, 8, r=2), LoRALinear(8, 8, r=2, init_lora_weights="mica"))
    refused(attach, model, r"the layer '1': its B is frozen \(MiCA")


def test_a_frozen_A():
    model = cases.random_model("cpu")
    model[2].lora_A.requires_grad_(False)
    for attach in (optim.lora_pro, optim.riemannian):
        refused(attach, model, "the layer '2': its A is frozen: lora_fa is the rule")
    optimizer = sgd(model)
    optim.lora_fa(model, optimizer).remove()
    assert [layer.lora_A.requires_grad for layer in model] == [True, True, False]


def test_layers_that_do_not_train_are_no_obstacle():
    model = cases.random_model("cpu")
    model[1].requires_grad_(False)
    cases.set_gradients(model)
    before = model[1].lora_A.grad.clone()
    optim.precondition_gradients_(model, optim.LoRAPro())
    assert torch.equal(model[1].lora_A.grad, before)


@each_rule
def test_a_shared_factor(attach):
    model = cases.random_model("cpu")
    model[1].lora_A = model[0].lora_A
    refused(attach, model, "the layer '1': it shares A or B with '0'")


def test_a_shared_layer_is_rewritten_once(monkeypatch):
    monkeypatch.setattr(blocks, "_BYTES", 1)  # a block for each pair
    one, two = (cases.random_model("cpu", shapes=((9, 12, 2), (9, 12, 2))) for _ in range(2))
    two[1].lora_A, two[1].lora_B, two[1].scaling = two[0].lora_A, two[0].lora_B, two[0].scaling
    cases.set_gradients(one)
    two[0].lora_A.grad, two[0].lora_B.grad = one[0].lora_A.grad.clone(), one[0].lora_B.grad.clone()
    for model in (one, two):
        optim.precondition_gradients_(model, optim.LoRAPro())
    torch.testing.assert_close(two[1].lora_B.grad, one[0].lora_B.grad)


@each_rule
def test_a_scaling_of_zero(attach):
    model = cases.random_model("cpu")
    model[0].scaling = 0.0
    refused(attach, model, "the layer '0': its scaling is 0")


@needs_ranks
def test_sharded_factors():
    def work(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = nn.Sequential(nn.Linear(8, 8))
        add_lora(model, LoRAConfig(r=2, target_modules=["0"]))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        for attach in RULES:
            refused(attach, model, "its factors are sharded.*DistributedDataParallel")

    on_ranks(1, work)


@each_rule
def test_no_adapters(attach):
    refused(attach, nn.Linear(4, 4), "Linear has no adapter that trains A and B: add_lora first")
    with pytest.raises(ValueError, match="has no adapter that trains"):
        optim.precondition_gradients_(nn.Linear(4, 4), optim.LoRAPro())


@each_rule
def test_optimizers(attach):
    model = cases.random_model("cpu")
    with pytest.raises(ValueError, match="the optimizer has no A and B of the model"):
        attach(model, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1))
    with pytest.raises(ValueError, match="not LBFGS"):
        attach(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got dict"):
        attach(model, {})
    assert all(layer.lora_A.requires_grad for layer in model)
    optimizer = sgd(model)
    handle = attach(model, optimizer)
    for other in RULES:
        with pytest.raises(ValueError, match=f"has the rule {attach.__name__}: remove"):
            other(model, optimizer)
    handle.remove()
    optim.riemannian(model, optimizer).remove()


def test_an_optimizer_of_one_factor():
    model = cases.random_model("cpu")
    rest, factors_B = lora_plus_groups(model, 1e-2)
    for group, missing in ((rest, "B"), (factors_B, "A")):
        for attach in (optim.lora_pro, optim.riemannian):
            with pytest.raises(ValueError, match=f"the optimizer lacks {missing} of layer '0'"):
                attach(model, torch.optim.SGD([group]))
    optim.lora_fa(model, torch.optim.SGD([factors_B]))


def test_a_factor_without_a_gradient():
    model = cases.random_model("cpu")
    cases.set_gradients(model)
    before = model[0].lora_B.grad.clone()
    model[1].lora_A.grad = None
    for rule in (optim.LoRAPro(), optim.Riemannian()):
        with pytest.raises(ValueError, match="A of layer '1' has no gradient, the other factor"):
            optim.precondition_gradients_(model, rule)
    assert torch.equal(model[0].lora_B.grad, before)


def test_sparse_gradients():
    model = cases.random_model("cpu")
    cases.set_gradients(model)
    model[0].lora_B.grad = None
    model[0].lora_B.grad = torch.zeros(9, 2).to_sparse()
    for rule in (optim.LoRAPro(), optim.LoRAFA()):
        with pytest.raises(TypeError, match=r"of B in layer '0' is torch\.sparse_coo"):
            optim.precondition_gradients_(model, rule)
    assert model[0].lora_A.grad is not None


@pytest.mark.parametrize("rule", [optim.LoRAPro, optim.Riemannian, optim.LoRAFA])
def test_damping(rule):
    for bad in (-1e-8, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"damping of {rule.name} must be .* and finite"):
            rule(bad)
    for bad in ("1e-8", True, None):
        with pytest.raises(TypeError, match="damping must be a number"):
            rule(bad)
    if rule is optim.Riemannian:
        with pytest.raises(ValueError, match="must be positive"):
            rule(0)
    else:
        rule(0)


@pytest.mark.parametrize("rule", ["lora_pro", optim.LoRAPro, None])
def test_what_is_no_rule(rule):
    with pytest.raises(TypeError, match=r"rule must be LoRAPro\(\), Riemannian\(\) or LoRAFA\(\)"):
        optim.precondition_gradients_(cases.random_model("cpu"), rule)


@each_rule
def test_a_later_adapter_that_does_not_fit(attach):
    """The step raises, before it has changed anything."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    add_lora(model, LoRAConfig(r=2, target_modules=["0"]))
    optimizer = sgd(model)
    attach(model, optimizer)
    model[0](torch.randn(3, 8)).square().sum().backward()
    before = model[0].lora_B.detach().clone(), model[0].lora_B.grad.clone()
    model[1] = LoRALinear(8, 8, r=2, init_lora_weights="lora_xs")
    with pytest.raises(ValueError, match="the layer '1'"):
        optimizer.step()
    assert torch.equal(model[0].lora_B, before[0]) and torch.equal(model[0].lora_B.grad, before[1])
