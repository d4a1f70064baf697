"""Rules in training: clipping, GradScaler, closures, resume, DDP, accelerate, several adapters."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, add_lora, lora_plus_groups, optim, set_adapter

from ...support.ranks import needs_ranks, on_ranks
from ...support.tiny_models import VOCABULARY, llama
from . import cases

ATTACH = {
    "lora_pro": (optim.lora_pro, optim.LoRAPro()),
    "riemannian": (optim.riemannian, optim.Riemannian()),
    "lora_fa": (optim.lora_fa, optim.LoRAFA()),
}
each_rule = pytest.mark.parametrize("name", ATTACH)


class Net(nn.Module):
    """12 → 9 → 7 with adapters of two ranks."""

    def __init__(self, device="cpu", dtype=torch.float32):
        super().__init__()
        self.layers = cases.random_model(device, dtype, ((9, 12, 2), (7, 9, 3)))

    def forward(self, x):
        return self.layers[1](torch.tanh(self.layers[0](x)))


def data(device="cpu", dtype=torch.float32, rows=16):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, 12, generator=generator).to(device, dtype)


def factors(model) -> list[torch.Tensor]:
    return [p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n]


def assert_equal_bits(one, other) -> None:
    for a, b in zip(factors(one), factors(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def groups(model, lr=1e-2):
    return lora_plus_groups(model, lr, 4, weight_decay=0.1)


def train(model, optimizer, steps=3, scaler=None, max_norm=None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(data()).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()


@each_rule
def test_the_hook_is_the_function(name, device):
    """`optimizer.step()` with a rule is the function and then a step of a plain optimizer."""
    hooked, plain = Net(device), Net(device)
    optimizers = [torch.optim.AdamW(groups(net)) for net in (hooked, plain)]
    handle = ATTACH[name][0](hooked, optimizers[0])
    for _ in range(3):
        for net, optimizer in zip((hooked, plain), optimizers, strict=True):
            optimizer.zero_grad()
            net(data(device)).square().mean().backward()
            if net is plain:
                optim.precondition_gradients_(plain, ATTACH[name][1])
            optimizer.step()
    assert_equal_bits(hooked, plain)
    assert handle.rule == ATTACH[name][1]


def test_sgd_is_the_theorem(device):
    """One step of SGD changes s·BA by the projected gradient, but for the square of lr."""
    net, lr = Net(device, torch.float64), 1e-6
    optimizer = torch.optim.SGD(lora_plus_groups(net, lr, 1))
    optim.lora_pro(net, optimizer)
    before = [cases.numbers(layer) for layer in net.layers]
    net(data(device, torch.float64)).square().mean().backward()
    grads = cases.gradients(net.layers)
    optimizer.step()
    for layer, (A, B, s), gradients in zip(net.layers, before, grads, strict=True):
        grad_A, grad_B = cases.lora_pro(A, B, s, *gradients)
        new_A, new_B, _ = cases.numbers(layer)
        got = s * (new_B @ new_A - B @ A) / -lr
        np.testing.assert_allclose(got, s * (B @ grad_A + grad_B @ A), rtol=1e-4, atol=1e-4)


@each_rule
def test_clipping_by_norm_may_be_before_or_after(name):
    """The hook sees clipped gradients; a rule is linear, so the direction is the same."""
    nets = [Net() for _ in range(2)]
    optimizer = torch.optim.SGD(nets[0].parameters(), lr=0.0)
    ATTACH[name][0](nets[0], optimizer)
    for net in nets:
        net(data()).square().mean().backward()
    norm = nn.utils.clip_grad_norm_([p for p in nets[0].parameters() if p.requires_grad], 1e-3)
    if name == "lora_fa":  # the norm is that of B only, as A had no gradient
        grads = [layer.lora_B.grad.norm() for layer in nets[1].layers]
        torch.testing.assert_close(norm, torch.stack(grads).norm())
    optimizer.step()
    optim.precondition_gradients_(nets[1], ATTACH[name][1])
    pairs = zip(cases.gradients(nets[0].layers), cases.gradients(nets[1].layers), strict=True)
    for clipped, whole in pairs:
        for one, other in zip(clipped, whole, strict=True):
            np.testing.assert_allclose(one, other * (1e-3 / float(norm)), rtol=1e-3, atol=1e-9)
    nn.utils.clip_grad_norm_(nets[1].parameters(), 1e-3)
    total = sum(np.square(g).sum() for pair in cases.gradients(nets[1].layers) for g in pair)
    assert total**0.5 == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("fused", [False, True])
@each_rule
def test_grad_scaler(name, fused):
    """A scale of a power of two changes no bit: fused optimizers get gradients that are scaled."""
    scaled, plain = Net(), Net()
    for net, scaler in ((scaled, torch.amp.GradScaler("cpu", init_scale=1024.0)), (plain, None)):
        optimizer = torch.optim.AdamW(groups(net), fused=fused)
        ATTACH[name][0](net, optimizer)
        train(net, optimizer, scaler=scaler)
    assert_equal_bits(scaled, plain)


@pytest.mark.parametrize("fused", [False, True])
@each_rule
def test_a_step_that_grad_scaler_skips(name, fused):
    net, scaler = Net(), torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = torch.optim.AdamW(groups(net), fused=fused)
    ATTACH[name][0](net, optimizer)
    before = factors(net)
    scaler.scale(net(data() * torch.inf).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    for old, new in zip(before, factors(net), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)
    train(net, optimizer, 1, scaler)
    assert all(bool(f.isfinite().all()) for f in factors(net))


@each_rule
def test_closures(name):
    """The rule runs after a closure's backward."""
    nets = [Net(), Net()]
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-2) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        ATTACH[name][0](net, optimizer)

    def closure():
        optimizers[0].zero_grad()
        loss = nets[0](data()).square().mean()
        loss.backward()
        return loss

    first = optimizers[0].step(closure)
    assert optimizers[0].step(closure=closure) < first
    train(nets[1], optimizers[1], 2)
    assert_equal_bits(*nets)


@each_rule
def test_resume(name):
    """Three steps are one step, a `state_dict`, and two more in a new process' objects."""
    through, first, second = Net(), Net(), Net()
    optimizers = [torch.optim.AdamW(groups(net)) for net in (through, first, second)]
    for net, optimizer in zip((through, first, second), optimizers, strict=True):
        ATTACH[name][0](net, optimizer)
    train(through, optimizers[0], 3, max_norm=1.0)
    train(first, optimizers[1], 1, max_norm=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    optimizers[2].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    train(second, optimizers[2], 2, max_norm=1.0)
    assert_equal_bits(through, second)


@needs_ranks
def test_ddp():
    """Two ranks with half of the batch each are one process with all of it."""

    def work(rank):
        found = {}
        for name, (attach, _) in ATTACH.items():
            net = Net()
            optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
            attach(net, optimizer)  # before the wrapper, which registers what trains
            parallel = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
            for _ in range(2):
                optimizer.zero_grad()
                parallel(data()[rank::2]).square().mean().backward()
                optimizer.step()
            found[name] = factors(net)
        wrapped = nn.parallel.DistributedDataParallel(Net())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=1e-2)
        with pytest.raises(ValueError, match="call lora_fa first, then wrap the model"):
            optim.lora_fa(wrapped, optimizer)
        optim.lora_pro(wrapped, optimizer)
        return found

    ranks = on_ranks(2, work)
    for name, (attach, _) in ATTACH.items():
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        attach(net, optimizer)
        train(net, optimizer, 2)
        for one, two, alone in zip(ranks[0][name], ranks[1][name], factors(net), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)
            torch.testing.assert_close(one, alone, rtol=1e-3, atol=1e-4)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    nets = [Net(), Net()]
    optimizers = [torch.optim.AdamW(groups(net)) for net in nets]
    model, prepared = accelerate.Accelerator(cpu=True).prepare(nets[0], optimizers[0])
    optim.lora_pro(model, prepared)
    optim.lora_pro(nets[1], optimizers[1])
    train(model, prepared)
    train(nets[1], optimizers[1])
    assert_equal_bits(*nets)


def test_lora_fa_keeps_A(device):
    """A is neither trained nor decayed, though the optimizer has it; `remove` gives it back."""
    net = Net(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    handle = optim.lora_fa(net, optimizer)
    before = [layer.lora_A.detach().clone() for layer in net.layers]
    for _ in range(2):
        net(data(device)).square().mean().backward()
        optimizer.step()
    for layer, old in zip(net.layers, before, strict=True):
        torch.testing.assert_close(layer.lora_A.detach(), old, rtol=0, atol=0)
        assert layer.lora_A.grad is None and layer.lora_A not in optimizer.state
    handle.remove()
    assert all(layer.lora_A.requires_grad for layer in net.layers)
    optimizer.zero_grad()
    net(data(device)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(net.layers[0].lora_A, before[0])


def two_adapters():
    model = nn.Sequential(nn.Linear(12, 9))
    config = LoRAConfig(r=2, residual="implicit", target_modules=["0"])
    add_lora(model, config, adapter_name="one")
    add_lora(model, config, adapter_name="two")
    return model


@each_rule
def test_the_active_adapter(name):
    """A rule follows `set_adapter`; LoRA-FA holds for an A that `set_adapter` lets train."""
    model = two_adapters()
    parameters = [p for n, p in model.named_parameters() if ".lora_" in n]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    set_adapter(model, "one")
    ATTACH[name][0](model, optimizer)
    set_adapter(model, "two")
    one, two = (model[0].adapter(n) for n in ("one", "two"))
    before = two.lora_A.detach().clone(), two.lora_B.detach().clone(), one.lora_B.detach().clone()
    model(data()).square().mean().backward()
    raw = two.lora_B.grad.clone()
    optimizer.step()
    assert not torch.allclose(two.lora_B.grad, raw)
    assert torch.equal(two.lora_A, before[0]) == (name == "lora_fa")
    assert not torch.equal(two.lora_B, before[1]) and torch.equal(one.lora_B, before[2])


def test_layers_without_gradients_are_left_alone():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    optim.lora_pro(net, optimizer)
    optimizer.step()
    before = factors(net)
    net.layers[0](data()).square().mean().backward()  # not layers[1]
    optimizer.step()
    after = factors(net)
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2]) and torch.equal(after[3], before[3])


def test_two_optimizers_have_their_own_layers():
    net = Net()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1e-2) for layer in net.layers]
    optim.lora_pro(net, optimizers[0])
    net(data()).square().mean().backward()
    want = cases.gradients(net.layers)
    for optimizer in optimizers:
        optimizer.step()
    got = cases.gradients(net.layers)
    assert not np.allclose(got[0][1], want[0][1])
    np.testing.assert_array_equal(got[1][1], want[1][1])


@each_rule
def test_autocast_around_the_step(name):
    """The algebra does not round to bfloat16."""
    nets = [Net(), Net()]
    for net, enabled in zip(nets, (True, False), strict=True):
        net(data()).square().mean().backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optim.precondition_gradients_(net, ATTACH[name][1])
    for got, want in zip(*(cases.gradients(net.layers) for net in nets), strict=True):
        np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_rule
def test_a_llama_trains(name, dtype):
    """With LoRAM's start, whose s·B₀A₀ is subtracted from the weights; also over bfloat16."""
    model = llama(dtype=dtype, num_hidden_layers=1)
    add_lora(model, LoRAConfig(r=2, rank_pattern={"v_proj": 3}, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    ATTACH[name][0](model, optimizer)
    ids = torch.arange(40).view(2, 20) * 7 % VOCABULARY
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(bool(p.isfinite().all()) for p in trained)


def test_a_model_s_own_backward_and_its_full_gradient():
    """LoRA-Pro's gradients, made by the layers' backward, against G of the full weight."""
    net = Net(dtype=torch.float64)
    x = data(dtype=torch.float64)
    net(x).square().mean().backward()
    full = []
    for layer in net.layers:
        weight = layer.to_linear().weight.detach().clone().requires_grad_()
        full.append((weight, layer.bias))
    hidden = torch.tanh(torch.nn.functional.linear(x, *full[0]))
    torch.nn.functional.linear(hidden, *full[1]).square().mean().backward()
    optim.precondition_gradients_(net, optim.LoRAPro(damping=0))
    parts = zip(net.layers, full, cases.gradients(net.layers), strict=True)
    for layer, (weight, _), (grad_A, grad_B) in parts:
        A, B, s = cases.numbers(layer)
        G = cases.as_float64(weight.grad)
        left = B @ np.linalg.pinv(B) @ G
        want = left + (G - left) @ np.linalg.pinv(A) @ A
        np.testing.assert_allclose(s * (B @ grad_A + grad_B @ A), want, rtol=0, atol=1e-9)
