"""The random starts: distributions, equality with PEFT, seeds, and what they do not read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.init import Gaussian, InitAB, InitABPlus, InitB, LoRA, get_initializer

from ..support.devices import rng_state
from ..support.oracle import to_numpy
from ..support.packages import needs_real_model

KINDS = [LoRA, InitB, Gaussian, InitAB, InitABPlus]
NAMES = {
    "lora": LoRA,
    "init_b": InitB,
    "gaussian": Gaussian,
    "init_ab": InitAB,
    "init_ab_plus": InitABPlus,
}


def test_distribution_is_peft_s(device):
    """The same numbers as nn.init.kaiming_uniform_(A, a=√5) with the same generator."""
    weight = torch.empty(64, 256, device=device)
    torch.manual_seed(4)
    start = LoRA()(weight, 16)
    torch.manual_seed(4)
    want = torch.empty(16, 256, device=device)
    nn.init.kaiming_uniform_(want, a=math.sqrt(5))
    torch.testing.assert_close(start.lora_A, want, rtol=1e-6, atol=0)
    assert (start.lora_B == 0).all() and start.lora_B.shape == (64, 16)


def test_init_b_is_kaiming_s(device):
    """The same distribution for B [out, r], whose fan-in is r."""
    weight = torch.empty(64, 256, device=device)
    torch.manual_seed(4)
    start = InitB()(weight, 16)
    torch.manual_seed(4)
    want = torch.empty(64, 16, device=device)
    nn.init.kaiming_uniform_(want, a=math.sqrt(5))
    torch.testing.assert_close(start.lora_B, want, rtol=1e-6, atol=0)
    assert (start.lora_A == 0).all() and start.lora_A.shape == (16, 256)


@needs_real_model
@pytest.mark.parametrize("init,ours", [(True, LoRA()), ("gaussian", Gaussian())])
def test_same_numbers_as_peft(init, ours, real_linears, device):
    """PEFT's own layer over real weights, from the same state of the generator."""
    peft = pytest.importorskip("peft")
    for linear in real_linears:
        model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
        config = peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=init)
        layer = peft.get_peft_model(model, config).base_model.model[0].to(device)
        torch.manual_seed(6)
        layer.reset_lora_parameters("default", init)
        torch.manual_seed(6)
        start = ours(linear.weight.to(device), 16)
        want = layer.lora_A["default"].weight
        torch.testing.assert_close(start.lora_A, want.detach(), rtol=1e-6, atol=0)
        assert torch.equal(start.lora_B, layer.lora_B["default"].weight)


@pytest.mark.parametrize(
    "initializer,factor,law",
    [
        (LoRA(seed=1), "lora_A", lambda n, m, r: stats.uniform(-(m**-0.5), 2 * m**-0.5)),
        (InitB(seed=1), "lora_B", lambda n, m, r: stats.uniform(-(r**-0.5), 2 * r**-0.5)),
        (Gaussian(seed=1), "lora_A", lambda n, m, r: stats.norm(0, 1 / r)),
        *(
            (kind(seed=1, gamma=gamma), factor, lambda n, m, r, g=gamma: stats.norm(0, g * m**-0.5))
            for kind in (InitAB, InitABPlus)
            for gamma in (0.25, 1.0, 16)
            for factor in ("lora_A", "lora_B")
        ),
    ],
    # A function's repr contains its address, but test names must agree between processes.
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_law(initializer, factor, law, device):
    """Kolmogorov-Smirnov test of the paper's distribution, with a fixed seed, so that it cannot
    fail by chance. With some thousand numbers, a σ that is 5 % off gives a p below 1e-3.
    """
    n, m, r = 300, 500, 16
    start = initializer(torch.empty(n, m, device=device), r, 3.0)  # s plays no part
    drawn = to_numpy(getattr(start, factor)).ravel()
    assert stats.kstest(drawn, law(n, m, r).cdf).pvalue > 1e-3
    assert start.lora_R is None and start.beta is None


@pytest.mark.parametrize("kind", [InitAB, InitABPlus])
def test_a_and_b_are_independent(kind, device):
    start = kind(seed=2)(torch.empty(400, 400, device=device), 8)
    A, B = to_numpy(start.lora_A).ravel(), to_numpy(start.lora_B.T).ravel()
    assert abs(np.corrcoef(A, B)[0, 1]) < 5 / math.sqrt(A.size)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_leaves_the_global_generator_alone(kind, device):
    weight = torch.empty(8, 12, device=device)
    state = rng_state(device)
    first, second = kind(seed=3)(weight, 4), kind(seed=3)(weight, 4)
    assert torch.equal(rng_state(device), state)
    assert torch.equal(first.lora_A, second.lora_A) and torch.equal(first.lora_B, second.lora_B)
    other = kind(seed=4)(weight, 4)
    assert not (torch.equal(first.lora_A, other.lora_A) and torch.equal(first.lora_B, other.lora_B))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype(kind, dtype, device):
    want = torch.float64 if dtype == torch.float64 else torch.float32
    start = kind()(torch.empty(4, 4, dtype=dtype, device=device), 2)
    assert start.lora_A.dtype == start.lora_B.dtype == want


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert get_initializer(name.upper()) == NAMES[name]()


@pytest.mark.parametrize("name", ["lora", "init_b", "gaussian", "init_ab_plus"])
def test_what_changes_nothing_works_on_meta(name):
    layer = LoRALinear(8, 6, r=2, init_lora_weights=name, device="meta")
    assert layer.lora_A.is_meta and layer.lora_A.shape == (2, 8)


def test_init_ab_on_meta():
    with pytest.raises(ValueError, match="InitAB reads the weight"):
        LoRALinear(8, 6, r=2, init_lora_weights="init_ab", device="meta")


@pytest.mark.parametrize(
    "make,error,match",
    [
        (lambda: LoRA(seed=0.5), TypeError, "seed must be an integer"),
        (lambda: InitB(seed=True), TypeError, "seed must be an integer"),
        (lambda: InitAB(gamma=0), ValueError, "gamma must be positive and finite, got 0"),
        (lambda: InitAB(gamma=-1.0), ValueError, "gamma must be positive"),
        (lambda: InitABPlus(gamma=math.nan), ValueError, "gamma must be positive"),
        (lambda: InitABPlus(gamma="1"), TypeError, "gamma must be a number"),
        (lambda: get_initializer("init_abb"), ValueError, "did you mean 'init_ab'"),
    ],
)
def test_bad(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_init_ab_subtracts_from_no_nan(bad, device):
    """It does not read the weight, but would write NaN back."""
    linear = nn.Linear(8, 6).to(device)
    with torch.no_grad():
        linear.weight[5, 7] = bad
    before = linear.weight.detach().clone()
    with pytest.raises(ValueError, match="NaN or Inf; it was not changed"):
        LoRALinear.from_linear(linear, r=2, init_lora_weights="init_ab")
    assert torch.equal(linear.weight.nan_to_num(9.0), before.nan_to_num(9.0))
