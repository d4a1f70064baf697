"""Layers that train only R, between a frozen B and A: LoRA-XS, LoRA-SB and a custom one."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear
from lora_kernels.init import Initializer, LoRASB, LoRAXS, Start

from ..support.oracle import ROUNDING
from ..support.packages import needs_real_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RESIDUALS = ["absorb", "implicit"]


@dataclass(frozen=True)
class Core(Initializer):
    """Random B, R and A that have to be subtracted, as no registered method does."""

    changes_base = True

    def __call__(self, weight, r, scaling=1.0, gradient=None):
        rows, cols = weight.shape
        generator = torch.Generator().manual_seed(1)
        A, B, R = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5
            for shape in ((r, cols), (rows, r), (r, r))
        )
        return Start(A, B, lora_R=R)


# Large enough to be visible: LoRA-XS's own R is 1e-5.
METHODS = [LoRAXS(sigma=0.3), LoRASB(learning_rate=3e-3), Core()]


def make(method, residual="absorb", dtype=torch.float32, *, device, **kwargs):
    """(layer, a copy of its original linear layer); s = 2."""
    linear = nn.Linear(48, 40, dtype=dtype).to(device)
    original = copy.deepcopy(linear)
    gradient = torch.randn(40, 48).to(device) if method.needs_gradient else None
    kwargs = {"r": 8, "lora_alpha": 16, **kwargs}
    layer = LoRALinear.from_linear(
        linear, init_lora_weights=method, residual=residual, gradient=gradient, **kwargs
    )
    return layer, original


def expected(layer, original, x, start=None):
    """(y, the size of its terms): y = x Wᵀ + b + s·x Aᵀ Rᵀ Bᵀ in float64, less s·B₀R₀A₀ (`start`)
    if that was subtracted.
    """
    x, W, b = (t.detach().double() for t in (x, original.weight, original.bias))
    delta = layer.scaling * product_of(layer)
    if start is not None:
        delta = delta - layer.scaling * start
    return x @ W.T + b + x @ delta.T, (x.abs() @ (W.abs() + delta.abs()).T).norm()


def product_of(layer) -> torch.Tensor:
    B, R, A = (p.detach().double() for p in (layer.lora_B, layer.lora_R, layer.lora_A))
    return B @ R @ A


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_life_of_a_layer(method, residual, dtype, device):
    layer, original = make(method, residual, dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.lora_R.dtype == wide
    assert layer.lora_R.shape == (8, 8)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == [
        "adapters.default.lora_R"
    ]
    start = product_of(layer) if method.changes_base else None
    x = torch.randn(5, 7, 48, dtype=dtype).to(device)
    want, size = expected(layer, original, x, start)
    # Factors, z, z Rᵀ and y are rounded, and s·BRA is of several times W's size.
    noise = 16 * ROUNDING[dtype] * size
    assert (layer(x).double() - want).norm() <= noise

    A, B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).double().square().mean().backward()
        optimizer.step()
    assert layer.lora_A.grad is None and layer.lora_B.grad is None and layer.weight.grad is None
    assert torch.equal(layer.lora_A, A) and torch.equal(layer.lora_B, B)
    if start is not None:
        assert not torch.allclose(product_of(layer), start)
    want, size = expected(layer, original, x, start)
    assert (layer(x).double() - want).norm() <= noise
    assert (layer.to_linear()(x).double() - want).norm() <= noise

    base = layer.base_linear()
    if start is None or residual == "implicit":
        assert torch.equal(base.weight, original.weight)
    else:
        room = 4 * ROUNDING[dtype] * (original.weight.double().norm() + 2 * start.norm())
        assert (base.weight.double() - original.weight.double()).norm() <= room
    layer.adapter_enabled = False
    assert (layer(x).double() - original(x).double()).norm() <= noise


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_copies(method, residual, device):
    """state_dict has lora_A, lora_B and lora_R whether they train or not."""
    layer, _ = make(method, residual, device=device)
    with torch.no_grad():
        layer.lora_R.add_(0.1)
    x = torch.randn(3, 48).to(device)
    y, base = layer(x), layer.base_linear()
    names = {"lora_A", "lora_B", "lora_R", "_extra_state"}
    names |= {"start_A", "start_B"} if method.changes_base else set()
    own = {f"adapters.default.{name}" for name in names}
    assert set(layer.state_dict()) == {"weight", "bias"} | own
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded, _ = make(method, residual, device=device)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), y)
        assert torch.equal(other.base_linear().weight, base.weight)
        assert not other.lora_A.requires_grad and other.lora_R.requires_grad
        with torch.no_grad():
            other.lora_R.zero_()
    assert torch.equal(layer(x), y)  # nothing was shared


def test_a_layer_without_r_has_none(device):
    layer = LoRALinear(48, 40, r=4, device=device)
    assert layer.lora_R is None and "adapters.default.lora_R" not in layer.state_dict()
    other, _ = make(METHODS[0], device=device)
    plain = LoRALinear(48, 40, r=8, lora_alpha=16, init_lora_weights="lora", device=device)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_R"):
        plain.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name", ["lora_xs", "lora_sb"])
def test_by_name(name, device):
    G = torch.randn(40, 48).to(device)
    linear = nn.Linear(48, 40).to(device)
    gradient = G if name == "lora_sb" else None
    x = torch.randn(3, 48).to(device)
    y = linear(x)
    layer = LoRALinear.from_linear(linear, r=4, init_lora_weights=name, gradient=gradient)
    assert (layer(x) - y).abs().max() <= 1e-3 * y.abs().max()  # both start close to W
    layer(x).square().sum().backward()
    assert layer.lora_R.grad.abs().max() > 0
    built = LoRALinear(48, 40, r=4, init_lora_weights=name, gradient=gradient, device=device)
    assert built.lora_R is not None


def test_lora_sb_takes_the_step_from_w(device):
    """Nothing is subtracted: the layer starts from W + s·BRA, a step of −η sign(G)."""
    G = torch.sign(torch.randn(40, 1) @ torch.randn(1, 48)).to(device)  # rank 1: no truncation
    linear = nn.Linear(48, 40).to(device)
    W = linear.weight.detach().clone()
    layer = LoRALinear.from_linear(
        linear, r=2, lora_alpha=6, init_lora_weights=LoRASB(learning_rate=0.01), gradient=G
    )
    assert torch.equal(layer.weight, W)
    torch.testing.assert_close(layer.to_linear().weight, W - 0.01 * G, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_dropout_is_that_of_x(residual, device):
    """The mean over many draws equals the layer without dropout; one draw scales x before A."""
    layer, _ = make(Core(), residual, torch.float64, device=device, lora_dropout=0.5)
    with torch.no_grad():
        layer.lora_R.add_(0.5)
    x = torch.randn(1, 48, dtype=torch.float64).to(device).expand(20000, 48)
    drawn = layer(x)
    spread = drawn.std(0) / 20000**0.5
    layer.eval()
    assert ((drawn.mean(0) - layer(x[:1])[0]).abs() <= 5 * spread).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, device):
    layer, _ = make(METHODS[0], "implicit", device=device, lora_dropout=0.3)
    x = torch.randn(6, 48).to(device).requires_grad_()
    grads = []
    for run in (layer, lambda v: checkpoint(layer, v, use_reentrant=reentrant)):
        torch.manual_seed(5)
        layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        grads.append([x.grad.clone(), layer.lora_R.grad.clone()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_compile(method, residual, device):
    torch.compiler.reset()  # every layer shares one forward, of which Dynamo keeps eight versions
    layer, _ = make(method, residual, device=device)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 48).to(device)
    compiled(x).sum().backward()
    got, layer.lora_R.grad = layer.lora_R.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(got, layer.lora_R.grad)
    torch.testing.assert_close(compiled(x), layer(x))


def test_autocast(device):
    layer, _ = make(METHODS[0], device=device)
    x = torch.randn(4, 48).to(device).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_R.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change,match",
    [
        (lambda start: {"lora_R": start.lora_R[:, :3]}, r"lora_R of shape \[8, 3\]"),
        (lambda start: {"lora_R": start.lora_R * float("nan")}, "lora_R that holds NaN"),
    ],
)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_an_r_that_does_not_fit(change, match, residual, device):
    @dataclass(frozen=True)
    class Broken(Core):
        def __call__(self, weight, r, scaling=1.0, gradient=None):
            start = super().__call__(weight, r, scaling, gradient)
            return Start(start.lora_A, start.lora_B, **change(start))

    linear = nn.Linear(48, 40).to(device)
    before = linear.weight.detach().clone()
    with pytest.raises(ValueError, match=match):
        LoRALinear.from_linear(linear, r=8, init_lora_weights=Broken(), residual=residual)
    assert torch.equal(linear.weight, before)


@needs_real_model
def test_trains_a_real_model(real_model, device):
    """SmolLM2 with LoRA-XS in two of its blocks: 14 · 64 · 64 parameters, and the loss falls."""
    model = copy.deepcopy(real_model).to(device).requires_grad_(False)
    for block in model.model.layers[:2]:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    options = {"r": 64, "lora_alpha": 64, "init_lora_weights": "lora_xs"}
                    setattr(parent, name, LoRALinear.from_linear(child, **options))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 14 * 64 * 64
    ids = torch.arange(100, 148, device=device)[None]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
