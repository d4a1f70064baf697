"""LoRA-GA, LoRA-One and LoRA-SB against the papers' formulas in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear
from lora_kernels.init import LoRAGA, LoRAOne, LoRASB, get_initializer

from ..ops.svd.spectra import noise_of, with_sigma
from ..support.devices import rng_state
from ..support.oracle import to_numpy
from ..support.packages import needs_real_model

KINDS = [LoRAGA, LoRAOne, LoRASB]
NAMES = ["lora_ga", "lora_one", "lora_sb"]
SHAPES = [(60, 90), (90, 60), (64, 64)]
METHODS = ["randomized", "exact"]


def stepped(n: int, m: int, steps: int) -> torch.Tensor:
    """The σ are well separated, so that each vector is determined up to its sign."""
    k = min(n, m)
    return with_sigma(n, m, np.concatenate([np.linspace(9, 3, steps), np.full(k - steps, 0.1)]))


def up_to_signs(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference between columns, each with the sign that fits better."""
    sign = np.sign((got * want).sum(0))
    return float(np.abs(got * sign - want).max())


@pytest.mark.parametrize("gradient_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_ga(shape, method, gradient_dtype, device):
    """B = c U[:, r:2r] and A = c V[:, :r]ᵀ with c = n^(1/4)/√γ and n the rows of W, as in the
    authors' code for `direction="ArB2r"`, `scale="stable"`.
    """
    r, gamma = 8, 5.0
    G = stepped(*shape, 2 * r).to(device, gradient_dtype)
    weight = torch.randn(*shape).to(device)
    start = LoRAGA(gamma=gamma, method=method)(weight, r, 0.3, G)
    U, _, Vh = np.linalg.svd(to_numpy(G), full_matrices=False)
    c = shape[0] ** 0.25 / gamma**0.5
    noise = 100 * max(noise_of(G), 2**-23) * c  # a gap of σ is 0.4 of 9
    assert up_to_signs(to_numpy(start.lora_B), c * U[:, r : 2 * r]) <= noise
    assert up_to_signs(to_numpy(start.lora_A).T, c * Vh[:r].T) <= noise
    assert start.lora_A.dtype == start.lora_B.dtype or gradient_dtype == torch.float64
    assert start.lora_R is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_one(shape, method, device):
    """BA = U_r (S_r / σ₁) V_rᵀ / γ of −G, with the root of S_r / σ₁ in each factor: a step
    downhill.
    """
    r, gamma = 8, 20.0
    G = stepped(*shape, 2 * r).to(device, torch.float32)
    start = LoRAOne(gamma=gamma, method=method)(torch.randn(*shape).to(device), r, 0.3, G)
    A, B = to_numpy(start.lora_A), to_numpy(start.lora_B)
    U, S, Vh = np.linalg.svd(-to_numpy(G), full_matrices=False)
    want = U[:, :r] * (S[:r] / S[0] / gamma) @ Vh[:r]
    noise = 30 * noise_of(G) / gamma
    assert np.abs(B @ A - want).max() <= noise
    for gram in (A @ A.T, B.T @ B):
        assert np.abs(gram - np.diag(S[:r] / S[0] / gamma)).max() <= max(noise, 1e-3 / gamma)
    assert (to_numpy(G) * (B @ A)).sum() < 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scaling", [1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_sb(shape, scaling, method, device):
    """s·B R A is the best approximation of −η sign(G) of rank r; B and A are orthonormal."""
    r, eta = 8, 1e-3
    G = torch.randn(*shape).to(device) * 1e-5
    G[:, 3] = 0  # a column with zero gradient: sign(0) = 0
    start = LoRASB(learning_rate=eta, method=method)(torch.randn(*shape).to(device), r, scaling, G)
    A, B, R = (to_numpy(t) for t in (start.lora_A, start.lora_B, start.lora_R))
    step = -eta * np.sign(to_numpy(G))
    U, S, Vh = np.linalg.svd(step, full_matrices=False)
    for gram in (A @ A.T, B.T @ B):
        assert np.abs(gram - np.eye(r)).max() <= 1e-5
    assert (np.diag(np.diag(R)) == R).all()
    if method == "exact":  # random signs: a randomized SVD only guarantees the error
        # Products at a gap of σ of 1e-2 of it are off by float32's rounding over that.
        assert np.abs(scaling * B @ R @ A - U[:, :r] * S[:r] @ Vh[:r]).max() <= 1e-3 * eta
        np.testing.assert_allclose(np.diag(R), S[:r] / scaling, rtol=1e-5)
    left = np.linalg.norm(step - scaling * B @ R @ A)
    assert left <= 1.001 * np.linalg.norm(S[r:])
    assert (to_numpy(G) * (B @ R @ A)).sum() < 0


@needs_real_model
@pytest.mark.parametrize("kind", KINDS)
def test_real_weights_and_gradients(kind, real_linears, real_gradients, device):
    """The product by the paper's formula, of a real gradient, in the layer."""
    r = 16
    for linear, G in zip(real_linears, real_gradients, strict=True):
        ours = nn.Linear(linear.in_features, linear.out_features, bias=False)
        ours.load_state_dict(linear.state_dict())
        ours = ours.to(device)
        W = to_numpy(linear.weight)
        layer = LoRALinear.from_linear(
            ours, r=r, lora_alpha=32, init_lora_weights=kind(method="exact"), gradient=G
        )
        A, B = to_numpy(layer.lora_A), to_numpy(layer.lora_B)
        U, S, Vh = np.linalg.svd(to_numpy(G), full_matrices=False)
        if kind is LoRAGA:
            # Vectors of nearly equal σ mix, so their spaces are compared.
            c = linear.out_features**0.25 / 4
            assert np.linalg.norm(A @ Vh[:r].T, "fro") == pytest.approx(c * r**0.5, rel=1e-3)
            assert np.linalg.norm(U[:, r : 2 * r].T @ B) == pytest.approx(c * r**0.5, rel=1e-3)
            residual = to_numpy(layer.weight) + layer.scaling * B @ A - W
            assert np.abs(residual).max() <= 4 * 2**-23 * (np.abs(W).max() + 2 * c**2)
            continue
        assert np.array_equal(to_numpy(layer.weight), W)
        if kind is LoRAOne:
            want, got = -U[:, :r] * (S[:r] / S[0] / 128) @ Vh[:r], B @ A
        else:
            U, S, Vh = np.linalg.svd(-3e-7 * np.sign(to_numpy(G)), full_matrices=False)
            want, got = U[:, :r] * S[:r] @ Vh[:r], 2 * B @ to_numpy(layer.lora_R) @ A
        # float32's rounding over the gap of σ_r and σ_{r+1}, 1e-2 of σ_r or more.
        assert np.linalg.norm(got - want) <= 2e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_generator(kind, device):
    weight, G = torch.randn(50, 40).to(device), torch.randn(50, 40).to(device)
    state, before = rng_state(device), G.clone()
    first, second = kind(seed=2)(weight, 6, 1.0, G), kind(seed=2)(weight, 6, 1.0, G)
    assert torch.equal(rng_state(device), state) and torch.equal(G, before)
    assert torch.equal(first.lora_A, second.lora_A) and torch.equal(first.lora_B, second.lora_B)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
@pytest.mark.parametrize("kind", [LoRAGA, LoRAOne, LoRASB])
def test_gradients_of_any_size(kind, scale, device):
    """Only the direction of G counts, although its squares over- or underflow float32."""
    weight, G = torch.randn(50, 40).to(device), stepped(50, 40, 16).float().to(device)
    for got, want in zip(
        *(
            (start.lora_B @ start.right(), start.lora_A.square().sum(1))
            for start in (kind()(weight, 8, 1.0, scale * G), kind()(weight, 8, 1.0, G))
        ),
        strict=True,
    ):
        torch.testing.assert_close(got.abs(), want.abs(), rtol=1e-3, atol=1e-4 * float(want.max()))


class TestBadGradients:
    @pytest.mark.parametrize("residual", ["absorb", "implicit"])
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize(
        "gradient,error,match",
        [
            (lambda: None, ValueError, r"give gradient=G \[out, in\]"),
            (lambda: torch.ones(48, 40), ValueError, r"shape \[48, 40\], the weight \[40, 48\]"),
            (lambda: torch.ones(40), ValueError, r"shape \[40\]"),
            (lambda: torch.zeros(40, 48), ValueError, "gradient is zero"),
            (lambda: torch.full((40, 48), math.nan), ValueError, "gradient holds NaN or Inf"),
            (lambda: torch.full((40, 48), math.inf), ValueError, "gradient holds NaN or Inf"),
            (lambda: torch.ones(40, 48, dtype=torch.int64), TypeError, "real float"),
            (lambda: torch.ones(40, 48, device="meta"), ValueError, "meta"),
            (lambda: [[1.0]], TypeError, "gradient must be a tensor, got list"),
        ],
    )
    def test_changes_nothing(self, gradient, error, match, name, residual, device):
        linear = nn.Linear(48, 40).to(device)
        before = linear.weight.detach().clone()
        options = {"r": 4, "init_lora_weights": name, "residual": residual}
        with pytest.raises(error, match=match):
            LoRALinear.from_linear(linear, gradient=gradient(), **options)
        assert torch.equal(linear.weight, before) and linear.weight.requires_grad

    def test_lora_ga_of_too_large_a_rank(self, device):
        G = torch.randn(40, 48).to(device)
        with pytest.raises(ValueError, match=r"2r = 42 singular vectors, more than .* r <= 20"):
            LoRAGA()(G, 21, 1.0, G)
        assert LoRAGA()(G, 20, 1.0, G).lora_A.shape == (20, 48)

    def test_lora_one_of_too_small_a_rank(self, device):
        G = (torch.randn(40, 3) @ torch.randn(3, 30)).to(device)
        with pytest.raises(ValueError, match=r"gradient has numerical rank 3, less than r = 5"):
            LoRAOne()(G, 5, 1.0, G)
        for kind in (LoRAGA, LoRASB):  # its factors are orthonormal for any G
            start = kind()(G, 5, 1.0, G)
            assert (start.lora_A.norm(dim=1) > 0.1).all() and (start.lora_B.norm(dim=0) > 0.1).all()

    def test_one_that_nobody_asked_for(self, device):
        linear = nn.Linear(48, 40).to(device)
        with pytest.raises(ValueError, match="LoRAM does not use a gradient"):
            LoRALinear.from_linear(linear, gradient=torch.ones(40, 48, device=device))

    @pytest.mark.parametrize("scaling", [0.0, -1.0, math.nan, math.inf])
    def test_bad_scaling(self, scaling, device):
        G = torch.randn(8, 9).to(device)
        with pytest.raises(ValueError, match="scaling must be"):
            LoRASB()(G, 2, scaling, G)


@pytest.mark.parametrize(
    "make,error,match",
    [
        (lambda: LoRAGA(gamma=0.0), ValueError, "gamma must be positive"),
        (lambda: LoRAOne(gamma="16"), TypeError, "gamma must be a number"),
        (lambda: LoRASB(learning_rate=-1e-3), ValueError, "learning_rate must be positive"),
        (lambda: LoRAGA(method="exakt"), ValueError, "did you mean 'exact'"),
        (lambda: LoRASB(seed=1.5), TypeError, "seed must be an integer"),
        (lambda: get_initializer("lora-ga"), ValueError, "did you mean 'lora_ga'"),
    ],
)
def test_bad_options(make, error, match):
    with pytest.raises(error, match=match):
        make()
