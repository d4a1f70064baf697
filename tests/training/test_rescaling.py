"""Proposition 1 of LoRAM: rescaled set-ups train alike, to float64's rounding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.init import Initializer, get_initializer, initializer_names
from lora_kernels.training.rescaling import ScaledStart, Setup, rescaled

from ..support.packages import needs_real_model
from ..support.running import layer_data

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
}
# eps as large as the gradients, so that leaving it unscaled shows; both kinds of weight decay.
SETUPS = {
    "sgd": Setup("sgd", 16, 3e-3, 1e-3, weight_decay_A=0.01, weight_decay_B=0.02),
    "adam": Setup("adam", 16, 1e-3, 4e-3, 1e-2, 1e-3, 0.01, 0.02),
    "adamw": Setup("adamw", 16, 1e-3, 4e-3, 1e-2, 1e-3, 0.01, 0.02),
}
STEPS = 20


@pytest.fixture(scope="module")
def linear(real_model) -> nn.Linear:
    """A real layer in float64."""
    return copy.deepcopy(real_model.model.layers[12].self_attn.k_proj).double()


def trajectory(linear, setup, start, residual="absorb") -> list[torch.Tensor]:
    """s·(BA) as a function: the layer's outputs on fixed inputs after every step."""
    layer = LoRALinear.from_linear(
        copy.deepcopy(linear),
        r=8,
        lora_alpha=setup.lora_alpha,
        init_lora_weights=setup.initializer(start),
        residual=residual,
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, linear.in_features, generator=generator, dtype=torch.float64)
    goal = torch.randn(32, linear.out_features, generator=generator, dtype=torch.float64)
    make, options = OPTIMIZERS[setup.optimizer]
    optimizer = make(setup.groups(layer), **options)
    outputs = [layer(x).detach()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        (layer(x) - goal).square().mean().backward()
        optimizer.step()
        outputs.append(layer(x).detach())
    return outputs


@needs_real_model
@pytest.mark.parametrize("residual", ["absorb", "implicit"])
@pytest.mark.parametrize("start", ["loram", "pissa"])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_same_trajectory(optimizer, start, residual, linear):
    """Any two α that are not powers of two: different bits, the same training.

    After 20 steps, which move the outputs by some per cent, the two differ by as much as float64's
    rounding (1e-16) of s·BA grows in 20 steps.
    """
    setup = SETUPS[optimizer]
    other = rescaled(setup, 3.7, 0.21)
    want = trajectory(linear, setup, start, residual)
    got = trajectory(linear, other, start, residual)
    moved = (want[-1] - want[0]).norm()
    assert moved >= 1e-2 * want[0].norm()
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-11 * moved


@needs_real_model
@pytest.mark.parametrize(
    "optimizer,wrong",
    [
        ("sgd", "lr_A"),
        ("sgd", "lr_B"),
        ("sgd", "weight_decay_A"),
        ("adam", "lr_A"),
        ("adam", "eps_A"),
        ("adam", "eps_B"),
        ("adam", "weight_decay_B"),
        ("adamw", "weight_decay_A"),
        ("adamw", "lora_alpha"),
    ],
)
def test_every_part_counts(optimizer, wrong, linear):
    """Leaving any single value unscaled is visible, far above rounding."""
    setup = SETUPS[optimizer]
    other = rescaled(setup, 3.7, 0.21)
    broken = Setup(**(vars(other) | {wrong: getattr(setup, wrong)}))
    want = trajectory(linear, setup, "loram")
    got = trajectory(linear, broken, "loram")
    assert (got[-1] - want[-1]).norm() > 1e-6 * (want[-1] - want[0]).norm()


def test_arithmetic():
    """The paper's exponents in numbers."""
    sgd = rescaled(Setup("sgd", 16, 1.0, 1.0, weight_decay_A=1.0), 2.0, 4.0)
    assert (sgd.lora_alpha, sgd.lr_A, sgd.lr_B) == (2.0, 4.0, 16.0)
    assert (sgd.alpha_A, sgd.alpha_B, sgd.weight_decay_A) == (2.0, 4.0, 0.25)
    adam = rescaled(Setup("adam", 16, 1.0, 1.0, 1.0, 1.0), 2.0, 4.0)
    assert (adam.lora_alpha, adam.lr_A, adam.lr_B) == (2.0, 2.0, 4.0)
    assert (adam.eps_A, adam.eps_B) == (0.5, 0.25)
    assert rescaled(sgd, 0.5, 0.25) == Setup("sgd", 16, 1.0, 1.0, weight_decay_A=1.0)


def test_scaled_start():
    """Its product is the original start's divided by α_Aα_B; B = 0 stays zero."""
    weight = torch.randn(12, 10)
    start = Setup("sgd", 1, 1, 1, alpha_A=2.0, alpha_B=8.0).initializer("pissa")
    assert isinstance(start, ScaledStart) and start.changes_base
    want = start.start(weight, 4, 16.0)
    got = start(weight, 4, 1.0)
    assert torch.equal(got.lora_A, 2 * want.lora_A) and torch.equal(got.lora_B, 8 * want.lora_B)
    assert not Setup("sgd", 1, 1, 1).initializer("lora").changes_base


@pytest.mark.parametrize("name", initializer_names())
def test_scaled_start_is_treated_as_its_start(name):
    scaled = Setup("sgd", 1, 1, 1, alpha_A=2.0).initializer(name)
    for what, value in vars(Initializer).items():
        if isinstance(value, (bool, str, property)) and not what.startswith("_"):
            want = getattr(scaled.start, what)
            if what == "reads_entries":
                assert getattr(scaled, what) >= want
            elif what != "has_recipe":
                assert what == "subtracts" or getattr(scaled, what) == want, what
    assert not scaled.has_recipe


@pytest.mark.parametrize("name", [n for n in initializer_names() if n != "lora_xs"])
def test_scaled_starts_give_the_same_function(name):
    """s·(BA − B₀A₀) is the same for any α: W, data and seed are passed on."""
    weight = torch.randn(12, 10)
    data = layer_data(get_initializer(name), weight)
    updates = []
    for setup in (Setup("sgd", 8, 1, 1), rescaled(Setup("sgd", 8, 1, 1), 2.0, 8.0)):
        linear = nn.Linear(10, 12, bias=False)
        linear.weight.data = weight.clone()
        torch.manual_seed(1)
        layer = LoRALinear.from_linear(
            linear,
            r=4,
            lora_alpha=setup.lora_alpha,
            init_lora_weights=setup.initializer(name),
            **data,
        )
        adapter = layer.active()
        assert adapter.lora_B.requires_grad == (layer.lora_R is None and name != "mica")
        updates.append(adapter.layer_state().scaling)
        with torch.no_grad():
            (adapter.lora_B if layer.lora_R is None else layer.lora_R).mul_(0.5)
        x = torch.ones(1, 10)
        updates.append(layer(x))
    assert updates[0] == 16 * updates[2]
    assert torch.allclose(updates[1], updates[3], atol=1e-4, rtol=1e-4)


def test_scaled_start_of_a_gradient():
    """s·BA of LoRA-GA is the same for any α; its G is passed on."""
    G, weight = torch.randn(12, 10), torch.randn(12, 10)
    products = []
    for setup in (Setup("sgd", 4, 1, 1), rescaled(Setup("sgd", 4, 1, 1), 2.0, 8.0)):
        linear = nn.Linear(10, 12)
        linear.weight.data = weight.clone()
        layer = LoRALinear.from_linear(
            linear,
            r=4,
            lora_alpha=setup.lora_alpha,
            init_lora_weights=setup.initializer("lora_ga"),
            gradient=G,
        )
        products.append(layer.scaling * layer.lora_B @ layer.lora_A)
    assert torch.equal(*products)  # powers of two


def test_scaled_start_of_a_base_that_is_rewritten():
    """LoftQ's base and s·BA are the same for any α."""
    linears = [nn.Linear(64, 48, bias=False) for _ in range(2)]
    linears[1].load_state_dict(linears[0].state_dict())
    layers = [
        LoRALinear.from_linear(
            linear, r=4, lora_alpha=setup.lora_alpha, init_lora_weights=setup.initializer("loftq")
        )
        for linear, setup in zip(
            linears, (Setup("sgd", 4, 1, 1), rescaled(Setup("sgd", 4, 1, 1), 2.0, 8.0)), strict=True
        )
    ]
    assert torch.equal(layers[0].weight, layers[1].weight)
    products = [layer.scaling * layer.lora_B @ layer.lora_A for layer in layers]
    assert torch.equal(*products)  # powers of two


def test_groups():
    model = nn.Sequential(LoRALinear(8, 6, r=2), nn.Tanh(), LoRALinear(6, 4, r=2))
    A, B = Setup("adam", 4, 1e-3, 2e-3, 1e-7, 1e-6).groups(model)
    assert (A["lr"], A["eps"], B["lr"], B["eps"]) == (1e-3, 1e-7, 2e-3, 1e-6)
    assert [p is q for p, q in zip(A["params"], (model[0].lora_A, model[2].lora_A), strict=True)]
    assert len(B["params"]) == 2 and "eps" not in Setup("sgd", 4, 1, 1).groups(model)[0]


def with_R() -> LoRALinear:
    return LoRALinear(4, 4, r=2, init_lora_weights="lora_xs")


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: Setup("adan", 1, 1, 1), "did you mean 'adam'"),
        (lambda: Setup("sgd", 1, 1, 1, alpha_A=0.0), "alpha_A must be positive"),
        (lambda: rescaled(Setup("sgd", 1, 1, 1), -1.0, 1.0), "alpha_A must be positive"),
        (lambda: rescaled(Setup("sgd", 1, 1, 1), 1.0, math.nan), "alpha_B must be positive"),
        (lambda: Setup("sgd", 1, 1, 1).groups(nn.Linear(2, 2)), "has no LoRALinear"),
        (lambda: Setup("sgd", 1, 1, 1).groups(with_R()), "trains R between a frozen A and B"),
        (lambda: Setup("sgd", 1, 1, 1).initializer("loramm"), "did you mean 'loram'"),
    ],
)
def test_bad(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_factor_that_is_no_number():
    with pytest.raises(TypeError, match="alpha_A must be a number, got str"):
        rescaled(Setup("sgd", 1, 1, 1), "2", 1.0)
