"""DoRA layers (`use_dora=True`) against the paper's formula in float64, with the norm constant."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lora_kernels import LoRAConfig, LoRALinear, disable_adapters, set_adapter, unload_lora
from lora_kernels.init import get_initializer, initializer_names
from lora_kernels.layers.adapter import Adapter
from lora_kernels.layers.options import AdapterOptions
from lora_kernels.layers.wrapper import LoRAWrapper

from ..support.exhaustive import EXHAUSTIVE, paired
from ..support.oracle import ROUNDING
from ..support.oracle import to_numpy as f64
from ..support.running import layer_data, quiet

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
RESIDUALS = ["absorb", "implicit"]


def dora(linear, **options):
    """A DoRA layer over the linear layer, with s = 2; its start is drawn from seed 1."""
    options = {"r": 4, "lora_alpha": 8, "use_dora": True} | options
    torch.manual_seed(1)
    data = layer_data(get_initializer(options.get("init_lora_weights", "loram")), linear.weight)
    return LoRALinear.from_linear(linear, **options, **data)


@torch.no_grad()
def moved(layer, size=0.1):
    """The layer after a random step of all that an adapter has."""
    for parameter in layer.adapters.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=size)
    return layer


class Oracle(NamedTuple):
    """y = g ∘ x Vᵀ + b with g = m ⊘ ‖V‖, and its gradients for dy with ‖V‖ constant, in float64."""

    y: np.ndarray
    gain: np.ndarray
    weight: np.ndarray  # g ∘ V
    grads: dict[str, np.ndarray]


def oracle(layer, x, dy, bias=None) -> Oracle:
    """The paper's equation 5, for the W that the layer stores."""
    adapter, s = layer.active(), layer.scaling
    W, A, B, m = map(f64, (layer.matrix(), adapter.lora_A, adapter.lora_B, adapter.lora_magnitude))
    R = np.eye(len(A)) if adapter.middle() is None else f64(adapter.middle())
    V = W + s * B @ R @ A
    if adapter.residual == "implicit" and adapter.start_A is not None:
        V = V - s * f64(adapter.start_B) @ f64(adapter.start_A)
    norms = np.sqrt((V**2).sum(1))
    x, dy = f64(x), f64(dy)
    gain = m / norms
    z = dy * gain
    grads = {
        "x": z @ V,
        "lora_A": s * (B @ R).T @ z.T @ x,
        "lora_B": s * z.T @ x @ (R @ A).T,
        "lora_R": s * B.T @ z.T @ x @ A.T,
        "lora_magnitude": (dy * (x @ V.T)).sum(0) / norms,
    }
    grads["lora_diag"] = np.diagonal(grads["lora_R"])
    y = x @ V.T * gain
    return Oracle(y if bias is None else y + f64(bias), gain, gain[:, None] * V, grads)


def near(got, want, tolerance):
    return np.linalg.norm(f64(got) - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start,residual", paired(initializer_names(), RESIDUALS))
def test_every_start_against_float64(start, residual, dtype):
    if get_initializer(start).rewrites_base:
        residual = "absorb"
    torch.manual_seed(0)
    linear = nn.Linear(24, 20, dtype=dtype)
    plain = dora(copy.deepcopy(linear), init_lora_weights=start, residual=residual, use_dora=False)
    layer = dora(linear, init_lora_weights=start, residual=residual)
    assert layer.lora_magnitude.shape == (20,) and layer.lora_magnitude.requires_grad
    x = torch.randn(2, 5, 24, dtype=dtype)
    allowed = 16 * ROUNDING[dtype]
    assert (layer.active().gain(layer.matrix()) == 1).all()  # exactly
    assert near(layer(x), f64(plain(x)), allowed)
    moved(layer).train()
    x, dy = x.flatten(0, 1).requires_grad_(), torch.randn(10, 20, dtype=dtype)
    layer(x).backward(dy)
    want = oracle(layer, x, dy, layer.bias)
    assert abs(want.gain - 1).max() > 0.01
    assert near(layer(x), want.y, allowed)
    assert near(x.grad, want.grads["x"], allowed)
    trained = {n: p for n, p in layer.active().named_parameters() if p.requires_grad}
    assert "lora_magnitude" in trained and len(trained) > 1
    for name, parameter in trained.items():
        assert near(parameter.grad, want.grads[name], 4 * allowed), name
    assert near(layer.effective_weight(), want.weight, allowed)
    assert near(layer.to_linear().weight, want.weight, allowed)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_the_start_is_that_without_dora(residual):
    """g is 1 exactly, and the restored weight has the bits that it has without DoRA."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 20, dtype=torch.bfloat16)
    plain = dora(copy.deepcopy(linear), residual=residual, use_dora=False)
    layer = dora(copy.deepcopy(linear), residual=residual)
    assert (layer.active().gain(layer.matrix()) == 1).all()
    norms = np.linalg.norm(f64(linear.weight), axis=1)
    assert near(layer.lora_magnitude, norms, 2.0**-8 if residual == "absorb" else 1e-6)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(moved(layer).restore_().weight, moved(plain).restore_().weight)


def test_the_gradient_of_the_effective_weight():
    torch.manual_seed(0)
    layer = moved(dora(nn.Linear(12, 10, dtype=torch.float64)))
    x, dy = torch.randn(6, 12, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    nn.functional.linear(x, layer.effective_weight()).backward(dy)
    want = oracle(layer, x, dy)
    for name in ("lora_A", "lora_B", "lora_magnitude"):
        assert near(getattr(layer, name).grad, want.grads[name], 1e-12), name


def test_rows_that_nearly_cancel():
    """The norm is that of what is left of a row, to its last digits."""
    torch.manual_seed(0)
    layer = dora(nn.Linear(64, 48), init_lora_weights="lora")
    with torch.no_grad():
        layer.lora_B.normal_()
        left = -2 * layer.lora_B.double() @ layer.lora_A.double()
        layer.weight.copy_(left + 1e-5 * torch.randn(48, 64))
    want = oracle(layer, torch.zeros(1, 64), torch.zeros(1, 48))
    rest = f64(layer.lora_magnitude) / want.gain
    assert rest.max() < 2e-4
    assert near(layer.active().row_norms(layer.matrix()), rest, 1e-6)
    merged = np.linalg.norm(f64(layer.to_linear().weight), axis=1)
    assert near(layer.lora_magnitude, merged, 0.05)  # the sum itself has few digits


def test_rows_of_zeros():
    """Their gain is 1, so that they can leave zero."""
    linear = nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight[2] = 0
    layer = dora(linear, init_lora_weights="lora", r=2)
    x = torch.randn(3, 8)
    y = layer(x)
    assert layer.lora_magnitude[2] == 0 and torch.equal(y[:, 2], layer.bias[2].expand(3))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    assert layer.to_linear().weight.isfinite().all() and layer.effective_weight().isfinite().all()


def test_dropout_acts_on_the_update_only():
    torch.manual_seed(0)
    layer = moved(dora(nn.Linear(12, 10), lora_dropout=0.5)).train()
    x = torch.randn(4, 12)
    torch.manual_seed(3)
    y = layer(x)
    gain = layer.active().gain(layer.matrix())
    magnitude, layer.active().lora_magnitude = layer.lora_magnitude, None
    torch.manual_seed(3)
    without = layer(x)
    layer.active().lora_magnitude = magnitude
    assert near(y, f64((without - layer.bias) * gain + layer.bias), 1e-6)
    assert not torch.equal(y, layer.eval()(x))


@pytest.mark.parametrize("start", ["loram", "lora"])
def test_a_wrapper_computes_the_same(start):
    """`LoRAWrapper`, for layers whose weight cannot be rewritten."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 20)
    layer = dora(copy.deepcopy(linear), init_lora_weights=start, residual="implicit")
    options = AdapterOptions(4, 8.0, "lora", 0.0, "implicit", True)
    initializer = get_initializer(start)
    torch.manual_seed(1)
    begun = initializer(linear.weight.detach(), 4, 2.0)
    wrapper = LoRAWrapper.over(linear)
    adapter = Adapter(options, begun, initializer.changes_base)
    wrapper.attach("default", adapter)
    adapter.measure_(wrapper.base_weight())
    x = torch.randn(3, 24, requires_grad=True)
    assert torch.equal(wrapper(x), linear(x))
    moved(layer)
    adapter.load_state_dict(layer.active().state_dict())
    assert near(wrapper(x), f64(layer(x)), 1e-6)
    for own in (wrapper, layer):
        own(x).square().sum().backward()
    for (name, mine), parameter in zip(
        adapter.named_parameters(), layer.active().parameters(), strict=True
    ):
        assert near(mine.grad, f64(parameter.grad), 1e-5), name
    assert near(wrapper.to_linear().weight, f64(layer.to_linear().weight), 1e-6)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_embeddings(residual):
    """The magnitudes are those of the columns of the table, as in PEFT."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8))
    ids, table = torch.tensor([[3, 7], [0, 29]]), f64(model[0].weight)
    before = model(ids).detach()
    quiet(model, LoRAConfig(r=4, use_dora=True, target_modules=["0"], residual=residual))
    layer = model[0]
    assert near(layer.lora_magnitude, np.linalg.norm(table, axis=0), 1e-6)
    assert near(model(ids), f64(before), 1e-6)
    one_hot = torch.eye(30, dtype=torch.float64)[ids.flatten()]
    dy = torch.randn(2, 2, 8)
    moved(layer)(ids).backward(dy)
    want = oracle(layer, one_hot, dy.flatten(0, 1))
    assert near(layer(ids).flatten(0, 1), want.y, 1e-6)
    for name in ("lora_A", "lora_B", "lora_magnitude"):
        assert near(getattr(layer, name).grad, want.grads[name], 1e-5), name
    assert near(layer.to_linear().weight.T, want.weight, 1e-6)
    assert near(unload_lora(model)(ids), f64(before), 1e-6)


def test_a_bias_that_trains():
    """The gain is not that of the bias: its gradient is the sum of dy's rows."""
    linear, conv = nn.Linear(12, 10), nn.Conv1d(4, 6, 3)
    model = nn.ModuleDict({"conv": conv, "linear": nn.Linear(12, 10)})
    options = {"r": 2, "use_dora": True, "bias": "lora_only"}
    quiet(model, LoRAConfig(target_modules=["conv", "linear"], **options))
    wrapper = LoRAWrapper.over(linear)
    adapter = Adapter(
        AdapterOptions(2, 8.0, "lora", 0.0, "implicit", True),
        get_initializer("lora")(linear.weight.detach(), 2, 1.0),
        False,
    )
    wrapper.attach("default", adapter)
    adapter.measure_(linear.weight.detach())
    inputs = {"conv": torch.randn(2, 4, 5), "linear": torch.randn(3, 12)}
    for layer, x in ((wrapper, inputs["linear"]), *((model[n], x) for n, x in inputs.items())):
        moved(layer)
        y = layer(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        sums = dy.sum((0, 2)) if dy.dim() == 3 else dy.sum(0)
        assert near(layer.bias.grad, f64(sums), 1e-5)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_convolutions(conv, residual):
    """As a convolution with the kernels of g ∘ V."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(4, 6, 3, stride=2, padding=1))
    x = torch.randn(2, 4, *(5,) * (model[0].weight.dim() - 2))
    before = model(x).detach()
    quiet(model, LoRAConfig(r=2, use_dora=True, target_modules=["0"], residual=residual))
    layer = model[0]
    assert near(model(x), f64(before), 1e-6)
    moved(layer)
    want = oracle(layer, torch.zeros(1, layer.in_features), torch.zeros(1, 6))
    kernels = torch.from_numpy(want.weight).view(layer.weight.shape)
    expected = nn.functional.__dict__[conv.__name__.lower()](
        x.double(), kernels, layer.bias.double(), 2, 1
    )
    assert near(model(x), f64(expected), 1e-6)
    assert near(layer.to_linear().weight, f64(kernels), 1e-6)
    assert near(unload_lora(model)(x), f64(before), 1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_the_norms_are_float32_under_autocast(kind):
    """Also with a product between A and B: g is 1 exactly, and later that of float32; and so is
    the weight that code of a model reads. Devices without autocast compute too.
    """
    torch.manual_seed(0)
    inner = {"linear": nn.Linear(12, 10), "conv": nn.Conv1d(4, 10, 3), "embedding": nn.Embedding(
        12, 10)}[kind]  # fmt: skip
    model = nn.Sequential(inner)
    start = get_initializer("lora_xs")
    quiet(model, LoRAConfig(r=4, use_dora=True, target_modules=["0"], init_lora_weights=start))
    for layer in (model[0], moved(model[0])):
        want, weight = layer.active().gain(layer.matrix()), layer.effective_weight()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.active().gain(layer.matrix()), want)
            assert torch.equal(layer.effective_weight(), weight)
    x = torch.zeros(3, dtype=torch.long) if kind == "embedding" else torch.ones(1, 4, 12)
    x = x if kind != "linear" else x[0]
    assert model.to("meta")(x.to("meta")).is_meta


def test_several_adapters_have_their_own_magnitudes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    x = torch.randn(3, 12)
    base = model(x).detach()
    for name, start in (("a", "loram"), ("b", "pissa")):
        config = LoRAConfig(
            r=2, use_dora=True, target_modules=["0"], init_lora_weights=start, residual="implicit"
        )
        quiet(model, config, adapter_name=name)
        assert near(model(x), f64(base), 1e-6)
        moved(model[0])
    found = {}
    for name in "ab":
        set_adapter(model, name)
        found[name] = model(x)
        want = oracle(model[0], x, torch.zeros(3, 10), model[0].bias)
        assert near(found[name], want.y, 1e-6)
    assert not torch.equal(found["a"], found["b"])
    with disable_adapters(model):
        assert torch.equal(model(x), base)


def test_state_dicts_and_copies():
    torch.manual_seed(0)
    layer = moved(dora(nn.Linear(12, 10)))
    x = torch.randn(3, 12)
    want = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    other = dora(nn.Linear(12, 10))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), want)
    with pytest.raises(RuntimeError, match="lora_magnitude"):
        dora(nn.Linear(12, 10), use_dora=False).load_state_dict(layer.state_dict())
    # As torch.distributed.checkpoint loads: into the tensors that there are.
    for residual in RESIDUALS:
        saved = dora(nn.Linear(12, 10), residual=residual).state_dict()
        plain = dora(nn.Linear(12, 10), residual=residual, use_dora=False)
        state = {name: saved[name] for name in plain.state_dict()}
        with pytest.raises(ValueError, match=r"has DoRA's magnitudes .* use_dora=True"):
            plain.load_state_dict(state)
    made = LoRALinear(12, 10, r=2, use_dora=True, dtype=torch.float64)
    assert made.lora_magnitude.dtype == torch.float64 and made.options.use_dora


@pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 compiles a layer")
def test_compiled_once_for_every_s():
    torch.manual_seed(0)
    layer = moved(dora(nn.Linear(12, 10), residual="implicit"))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(3, 12)
    for s in (2.0, 0.5):
        layer.scaling = s
        grads = []
        for run in (layer, compiled):
            layer.zero_grad()
            y = run(x)
            y.square().sum().backward()
            grads.append([y, *(p.grad for p in layer.parameters() if p.requires_grad)])
        assert all(near(a, f64(b), 1e-5) for a, b in zip(*grads, strict=True))
    assert counter.frame_count == 1


def test_bad_arguments():
    linear = nn.Linear(8, 6)
    before = linear.weight.detach().clone()
    with pytest.raises(TypeError, match="use_dora must be True or False, got 'yes'"):
        dora(linear, use_dora="yes")
    with pytest.raises(TypeError, match="use_dora must be True or False, got 1"):
        LoRALinear(8, 6, r=2, use_dora=1)
    assert torch.equal(linear.weight, before)
    with torch.no_grad():
        linear.weight[1, 1] = torch.inf
    with pytest.raises(ValueError, match=r"use_dora needs the norms .* one is not finite"):
        dora(linear, init_lora_weights="lora", r=2)
    assert type(linear) is nn.Linear and linear.weight.requires_grad
    with pytest.raises(ValueError, match=r"use_dora .* the weight is on the meta device: load it"):
        LoRALinear(8, 6, r=2, use_dora=True, init_lora_weights="lora", device="meta")
