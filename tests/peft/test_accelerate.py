"""`lora_kernels.peft.accelerate`: our operator in PEFT's layers, else PEFT's own forward."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

from ..support.oracle import ROUNDING
from ..support.packages import needs_peft
from ..support.peft_models import MODELS, accelerate, adapted, initialize, linear_layers
from ..support.running import close, logits, move, token_ids
from ..support.tiny_models import gpt2, llama

pytestmark = needs_peft


def trained(model: nn.Module, steps: int = 3) -> tuple[list, dict]:
    """The losses of AdamW's steps, and the last gradients of all parameters."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        batch = token_ids(seed=step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: p.grad.clone() for name, p in trainable.items()}


def fused_calls(monkeypatch) -> list:
    """A list that grows by one whenever a layer uses our operator."""
    # In the package, the module's name is that of the function.
    module = importlib.import_module("lora_kernels.peft.accelerate")
    calls, find = [], module._fusable_adapter

    def recorded(layer, x):
        adapter = find(layer, x)
        if adapter is not None:
            calls.append(adapter)
        return adapter

    monkeypatch.setattr(module, "_fusable_adapter", recorded)
    return calls


@pytest.mark.parametrize("method", ["loram", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_trains_as_peft_does(kind, method, monkeypatch):
    """The oracle is PEFT's own forward in float64; ours is as near to it as PEFT's in float32."""
    model = adapted(MODELS[kind]())
    initialize(model, method)
    move(model, 0.01)
    peft_s, oracle = copy.deepcopy(model), copy.deepcopy(model).double()
    report = accelerate(model)
    assert report.layers == list(linear_layers(model)) and not report.left
    calls = fused_calls(monkeypatch)
    losses, gradients = trained(model)
    assert len(calls) == 3 * len(report.layers)
    del calls[:]
    peft_losses, peft_gradients = trained(peft_s)
    true_losses, true_gradients = trained(oracle)
    assert not calls
    for got, peft_loss, want in zip(losses, peft_losses, true_losses, strict=True):
        assert abs(got - want) <= 4e-6 and abs(peft_loss - want) <= 4e-6
    for name, want in true_gradients.items():
        # After two steps of Adam, which divides by the gradient's size; PEFT's own differ as much.
        assert close(gradients[name], want, 1024), name
        assert close(peft_gradients[name], want, 1024), name


def test_gradients_reach_a_base_that_trains():
    """As `capture_gradients` or bias="all" need them."""
    model = adapted(gpt2(), bias="all")
    initialize(model)
    move(model)
    base = linear_layers(model)["transformer.h.0.mlp.c_fc"].get_base_layer()
    base.weight.requires_grad_(True)
    _, want = trained(copy.deepcopy(model), 1)
    accelerate(model)
    _, got = trained(model, 1)
    assert any(name.endswith("c_fc.base_layer.weight") for name in got)
    assert any(name.endswith("c_fc.base_layer.bias") for name in got)
    assert all(close(got[name], want[name], 256) for name in want)


def test_bfloat16_base_with_float32_adapters():
    """PEFT multiplies A and B in float32, we round them to bfloat16: A, B and x Aᵀ once each, for
    the adapter and for the start, and y.
    """
    model = adapted(llama(dtype=torch.bfloat16))
    initialize(model)
    move(model)
    accelerate(model)
    rounding = ROUNDING[torch.bfloat16]
    for layer in linear_layers(model).values():
        x = torch.randn(5, layer.in_features).bfloat16()
        with torch.no_grad():
            y = layer(x)
        A, B, A0, B0 = (
            factor.detach().double()
            for factor in (
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.lora_start_A["default"],
                layer.lora_start_B["default"],
            )
        )
        x = x.double()
        W = layer.get_base_layer().weight.detach().double()
        want = x @ W.T + 2 * (x @ A.T @ B.T - x @ A0.T @ B0.T)
        sizes = x.abs() @ A.abs().T @ B.abs().T + x.abs() @ A0.abs().T @ B0.abs().T
        # 1.01 for the products of roundings, and for sums in float32.
        bound = 1.01 * rounding * (want.abs() + 3 * 2 * sizes)
        assert y.dtype == torch.bfloat16
        assert bool(((y.double() - want).abs() <= bound).all())
    # An implicit start cancels within the product: only y's rounding remains.
    start = adapted(llama(dtype=torch.bfloat16))
    initialize(start)
    accelerate(start)
    want = logits(llama(dtype=torch.bfloat16)).double()
    assert float((logits(start).double() - want).abs().max() / want.abs().max()) <= 8 * rounding


def test_autocast(monkeypatch):
    model = adapted(llama())
    initialize(model)
    move(model)
    with torch.autocast("cpu", torch.bfloat16):
        want = logits(model)
        accelerate(model)
        calls = fused_calls(monkeypatch)
        got = logits(model)
    assert len(calls) == 14 and got.dtype == want.dtype
    assert float((got - want).abs().max() / want.abs().max()) <= 16 * 2**-8


def test_dropout():
    """In training only, only for the x that A multiplies, and governed by the global seed."""
    model = adapted(llama(), lora_dropout=0.5)
    initialize(model)
    move(model)
    whole = logits(model)
    accelerate(model)
    assert close(logits(model), whole)
    layer = linear_layers(model)["model.layers.0.mlp.up_proj"].train()
    x = torch.randn(16, layer.in_features)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(x).detach()

    assert torch.equal(run(3), run(3)) and not close(run(3), run(4))
    mean = torch.stack([run(seed) for seed in range(2000)]).mean(0)
    want = layer.eval()(x).detach()
    # The mask's standard error: the size of the adapter's part over √2000.
    spread = (want - layer.get_base_layer()(x)).detach().std() + x.std()
    assert float((mean - want).abs().max()) <= 6 * float(spread) / 2000**0.5

    model.train()
    torch.manual_seed(0)
    _, want = trained(copy.deepcopy(model), 1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    _, got = trained(model, 1)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_all_other_calls_are_peft_s(monkeypatch):
    from peft import LoraConfig

    model = adapted(llama())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    initialize(model)
    initialize(model, adapter_name="second")
    move(model)
    twin = copy.deepcopy(model)
    accelerate(model)
    calls = fused_calls(monkeypatch)

    def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        assert torch.equal(ours, theirs) and not calls

    with model.disable_adapter(), twin.disable_adapter():
        same(logits(model), logits(twin))
    names = ["default", "second", "__base__"]
    same(logits(model, adapter_names=names), logits(twin, adapter_names=names))
    for each in (model, twin):
        each.merge_adapter()
    same(logits(model), logits(twin))
    for each in (model, twin):
        each.unmerge_adapter()
        each.base_model.set_adapter(["default", "second"])
    want = logits(twin)
    assert close(logits(model), want)
    assert len(calls) == 10  # the layers with one of the two adapters
    del calls[:]
    for each in (model, twin):
        each.base_model.set_adapter("second")
    assert close(logits(model), logits(twin)) and len(calls) == 4
    del calls[:]
    for layer in linear_layers(model).values():
        layer.get_base_layer().register_forward_hook(lambda *args: None)
    same(logits(model), logits(twin))
    with pytest.raises(RuntimeError, match="dtype"):
        next(iter(linear_layers(model).values()))(torch.ones(1, 32, dtype=torch.float64))


def test_merging_saving_and_switching_go_on(tmp_path):
    from peft import PeftModel

    model = adapted(llama())
    initialize(model)
    accelerate(model)
    move(model)
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert close(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), want)
    assert close(logits(copy.deepcopy(model).merge_and_unload()), want)
    assert torch.equal(logits(copy.deepcopy(model).unload()), logits(llama()))


@pytest.mark.parametrize("kind", MODELS)
def test_compiles(kind):
    model = adapted(MODELS[kind](), lora_dropout=0.1)
    initialize(model)
    move(model)
    accelerate(model)
    layer = next(iter(linear_layers(model).values()))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    want = layer(x)
    (want_grad,) = torch.autograd.grad(want.sum(), x)
    assert close(y, want) and close(grad, want_grad)
    layer.enable_adapters(False)  # recompiles
    assert close(compiled(x), layer.get_base_layer()(x))


def test_undo_and_repeated_calls():
    model = adapted(llama())
    initialize(model)
    move(model)
    want = logits(model)
    first, second = accelerate(model), accelerate(model)
    assert first.layers == second.layers
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    second.undo()
    assert torch.equal(logits(model), want)
    assert not any("forward" in vars(layer) for layer in linear_layers(model).values())
    first.undo()
    for layer in linear_layers(copied).values():
        assert vars(layer)["forward"].owner is layer
    assert close(logits(copied), want)

    report = accelerate(model)
    layer = next(iter(linear_layers(model).values()))
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(RuntimeError, match="its forward was wrapped since"):
        report.undo()
    assert accelerate(model).left == {report.layers[0]: "its forward is wrapped by another tool"}
    layer.forward = inner
    report.undo()
    assert torch.equal(logits(model), want)


def test_initialized_afterwards(monkeypatch):
    """The start is looked up at each call, and no longer found once it is undone."""
    model = adapted(llama())
    accelerate(model)
    report = initialize(model, "pissa")
    calls = fused_calls(monkeypatch)
    assert close(logits(model), logits(llama())) and len(calls) == 14
    move(model)
    report.undo()
    assert torch.equal(logits(model), logits(llama())) and len(calls) == 28


def test_report():
    model = adapted(gpt2(), target_modules=["c_fc", "wte"])
    report = accelerate(model)
    assert report.layers == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    assert str(report) == (
        "fused forward in 2 of 3 LoRA layers\n"
        "  skipped 1: PEFT's Embedding is not over a plain linear layer (transformer.wte)"
    )


class _Odd(nn.Linear):
    """A layer that accelerate must not compute by itself."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    "change, options, reason",
    [
        (None, {"lora_bias": True}, "its lora_B has a bias"),
        ("class", {}, "its base is _Odd, not a plain linear layer"),
        ("hook", {}, "its base has hooks or a wrapped forward"),
    ],
)
def test_layers_that_are_skipped(change, options, reason):
    base = llama()
    layer = base.model.layers[0].mlp.up_proj
    if change == "class":
        layer.__class__ = _Odd
    if change == "hook":
        layer.register_forward_hook(lambda module, args, y: y + 1)
    model = adapted(base, target_modules=["layers.0.mlp.up_proj"], **options)
    want = logits(model)
    report = accelerate(model)
    assert report.left == {"model.layers.0.mlp.up_proj": reason} and not report.layers
    assert torch.equal(logits(model), want)


def test_not_a_peft_model():
    with pytest.raises(TypeError, match=r"must be a peft\.PeftModel, got Linear"):
        accelerate(nn.Linear(2, 2))
