"""Orthogonal, MiCA, KaSA and LoRA-XS "bottom" against their formulas, and in layers and models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lora_kernels import LoRAConfig, LoRALinear, add_lora, disable_adapters, optim, unload_lora
from lora_kernels.init import KaSA, LoRAXS, MiCA, Orthogonal, get_initializer

from ..ops.svd.spectra import with_sigma
from ..support.devices import rng_state
from ..support.oracle import ROUNDING, to_numpy
from ..support.packages import needs_real_model, needs_transformers

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(40, 28), (28, 40), (32, 32)]
BOTTOM = LoRAXS(retain_part="bottom")
KINDS = [MiCA(), MiCA(method="exact"), KaSA(seed=0), KaSA("exact", seed=0), BOTTOM]
R = 4


def weight_of(n: int, m: int) -> torch.Tensor:
    """All σ are apart, so that each vector is determined up to its sign."""
    return with_sigma(n, m, np.linspace(3, 0.5, min(n, m)))


def up_to_signs(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference between columns, each with the sign that fits better."""
    return float(np.abs(got * np.sign((got * want).sum(0)) - want).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initializer", KINDS, ids=str)
def test_formulas(initializer, shape, dtype, device):
    W = weight_of(*shape).to(device, dtype)
    start = initializer(W, R, 2.0)
    U, S, Vh = np.linalg.svd(to_numpy(W), full_matrices=False)
    U, S, Vh = U[:, -R:], S[-R:], Vh[-R:]
    bound = 1e-9 if dtype == torch.float64 else 1e-4
    A, B = to_numpy(start.lora_A), to_numpy(start.lora_B)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    assert start.lora_A.dtype == start.lora_B.dtype == work
    if isinstance(initializer, KaSA):
        A0, B0 = map(to_numpy, start.taken)
        assert np.abs(2 * B0 @ A0 - U * S @ Vh).max() <= bound
        assert not B.any() and np.abs(A).max() <= shape[1] ** -0.5
        assert start.lora_diag.shape == (R,) and start.lora_diag.dtype == work
        return
    assert up_to_signs(B, U) <= bound
    if isinstance(initializer, MiCA):
        assert not A.any()
    else:
        assert up_to_signs(A.T, (S[:, None] * Vh).T) <= bound
        assert start.lora_R.shape == (R, R)
        assert np.abs(to_numpy(start.lora_R)).max() <= 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [2, 6, 28])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal(shape, r, dtype, device):
    W = torch.zeros(shape, device=device, dtype=dtype)
    start = Orthogonal(seed=3)(W, r)
    A, B = to_numpy(start.lora_A), to_numpy(start.lora_B)
    rounding = ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]
    size = np.linalg.norm(B, axis=1)[:, None] * np.linalg.norm(A, axis=0)
    assert (np.abs(B @ A) <= 8 * rounding * size).all()
    # A Aᵀ and Bᵀ B have r/2 directions each, and these are orthogonal to each other.
    for factor, count in ((A, shape[1]), (B.T, shape[0])):
        assert np.linalg.matrix_rank(factor, 1e-5) == r // 2
        assert 0.5 <= np.linalg.norm(factor) / (count * r / 2) ** 0.5 * 10 <= 1.6
    # X₁ and X₂ are normal: so is every number of A and B, with variance 1/200 · ‖q‖².
    assert np.abs(A).max() <= 0.6 and np.abs(B).max() <= 0.6


def test_orthogonal_is_seeded(device):
    W = torch.zeros(40, 28, device=device)
    before = rng_state(device)
    one, other = Orthogonal(seed=1)(W, 4), Orthogonal(seed=1)(W, 4)
    assert torch.equal(rng_state(device), before)
    assert torch.equal(one.lora_A, other.lora_A) and torch.equal(one.lora_B, other.lora_B)
    assert not torch.equal(Orthogonal(seed=2)(W, 4).lora_A, one.lora_A)
    assert Orthogonal().draws_unseeded and not Orthogonal(seed=1).draws_unseeded
    assert not torch.equal(Orthogonal()(W, 4).lora_A, Orthogonal()(W, 4).lora_A)


def test_kasa_is_seeded(device):
    W = weight_of(40, 28).float().to(device)
    before = rng_state(device)
    one, other = KaSA(seed=1)(W, 4), KaSA(seed=1)(W, 4)
    assert torch.equal(rng_state(device), before)
    assert torch.equal(one.lora_diag, other.lora_diag) and torch.equal(one.lora_A, other.lora_A)
    assert KaSA().draws_unseeded and not torch.equal(KaSA()(W, 4).lora_A, KaSA()(W, 4).lora_A)


@pytest.mark.parametrize("residual", ["absorb", "implicit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_life_of_a_kasa_model(dtype, residual, device):
    """It starts as the truncated model, trains A, B and λ, and gives the original back."""
    model = nn.Sequential(nn.Linear(28, 40), nn.Tanh(), nn.Linear(40, 28)).to(device, dtype)
    original = copy.deepcopy(model)
    x = torch.randn(5, 28, device=device, dtype=dtype)
    truncated = copy.deepcopy(model)
    for linear in (truncated[0], truncated[2]):
        U, S, Vh = np.linalg.svd(to_numpy(linear.weight), full_matrices=False)
        kept = U[:, :-R] * S[:-R] @ Vh[:-R]
        linear.weight.data.copy_(torch.from_numpy(kept))
    config = LoRAConfig(r=R, lora_alpha=2 * R, init_lora_weights="kasa", residual=residual)
    add_lora(model, config, progress=False)
    bound = 64 * ROUNDING[dtype] * 8
    assert (model(x) - truncated(x)).abs().max() <= bound
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "lora_diag"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # λ has a gradient once B is not zero
        optimizer.zero_grad()
        loss = model(x).square().sum() + optim.kasa_penalty(model, 0.1, 0.1).to(dtype)
        loss.backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    with disable_adapters(model):
        assert (model(x) - original(x)).abs().max() <= bound
    unload_lora(model)
    assert (model(x) - original(x)).abs().max() <= bound


def test_kasa_penalty(device):
    """β‖λ‖² + γ(‖BᵀB − I‖ + ‖AAᵀ − I‖), and its gradients by finite differences."""
    linear = LoRALinear(28, 40, r=3, init_lora_weights="kasa", device=device, dtype=torch.float64)
    factors = linear.lora_A, linear.lora_B, linear.lora_diag
    for factor in factors:
        factor.data.normal_()
    A, B, diag = map(to_numpy, factors)
    want = 0.3 * (diag**2).sum() + 0.7 * (
        np.linalg.norm(B.T @ B - np.eye(3)) + np.linalg.norm(A @ A.T - np.eye(3))
    )
    assert float(optim.kasa_penalty(linear, 0.3, 0.7)) == pytest.approx(want, rel=1e-12)

    def penalty(*values):
        names = ("lora_A", "lora_B", "lora_diag")
        named = {f"adapters.default.{n}": v for n, v in zip(names, values, strict=True)}
        return torch.func.functional_call(
            _Penalty(linear), {f"layer.{n}": v for n, v in named.items()}
        )

    assert torch.autograd.gradcheck(penalty, factors)


class _Penalty(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> torch.Tensor:
        return optim.kasa_penalty(self.layer, 0.3, 0.7)


def test_kasa_penalty_refuses():
    model = nn.Sequential(nn.Linear(8, 8))
    add_lora(model, LoRAConfig(r=2), progress=False)
    with pytest.raises(ValueError, match="init_lora_weights='kasa'"):
        optim.kasa_penalty(model)
    with pytest.raises(ValueError, match="gamma must not be negative"):
        optim.kasa_penalty(model, 0.1, -1.0)
    with pytest.raises(ValueError, match="beta must be finite"):
        optim.kasa_penalty(model, float("nan"))


def test_mica_trains_a_alone(device):
    model = nn.Sequential(nn.Linear(28, 40), nn.Tanh(), nn.Embedding(50, 12)).to(device)
    x = torch.randn(5, 28, device=device)
    want = model[0](x)
    config = LoRAConfig(r=R, target_modules=["0", "2"], init_lora_weights="mica")
    add_lora(model, config, progress=False)
    assert torch.equal(model[0](x), want)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A"}
    B = to_numpy(model[2].lora_B)  # [dim, r], of W [dim, tokens]
    U = np.linalg.svd(to_numpy(model[2].weight).T, full_matrices=False)[0]
    assert up_to_signs(B, U[:, -R:]) <= 1e-4


@needs_transformers
@pytest.mark.parametrize("name", ["orthogonal", "mica", "kasa", "lora_xs"])
def test_conv1d(name, device):
    """Of GPT-2's Conv1D, which stores Wᵀ, the start is that of a linear layer."""
    from transformers.pytorch_utils import Conv1D

    linear = nn.Linear(28, 40).to(device)
    conv = Conv1D(40, 28).to(device)
    conv.weight.data.copy_(linear.weight.mT)
    conv.bias.data.copy_(linear.bias)
    initializer = BOTTOM if name == "lora_xs" else get_initializer(name)
    if name in ("orthogonal", "kasa"):
        initializer = type(initializer)(seed=0)
    layers = []
    for module in (linear, conv):
        model = nn.Sequential(module)
        add_lora(model, LoRAConfig(r=R, init_lora_weights=initializer), progress=False)
        layers.append(model[0])
    x = torch.randn(5, 28, device=device)
    for factor in ("lora_A", "lora_B"):
        one, other = (getattr(layer, factor) for layer in layers)
        assert (one - other).abs().max() <= 1e-4
    assert (layers[0](x) - layers[1](x)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["orthogonal", "kasa"])
def test_embeddings_are_refused(name):
    model = nn.Sequential(nn.Embedding(50, 12))
    with pytest.raises(ValueError, match=r"0: .*exclude_modules"):
        add_lora(model, LoRAConfig(r=2, target_modules=["0"], init_lora_weights=name))
    assert type(model[0]) is nn.Embedding


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: Orthogonal()(torch.zeros(8, 8), 3), "even rank, got r = 3"),
        (lambda: KaSA()(torch.randn(8, 6), 6), "take r < 6"),
        (lambda: KaSA()(torch.full((8, 6), torch.inf), 2), "NaN or Inf"),
        (lambda: MiCA()(torch.full((8, 6), torch.nan), 2), "NaN or Inf"),
        (lambda: LoRAXS(retain_part="buttom"), "did you mean 'bottom'"),
        (lambda: LoRAXS(retain_part="bottom", tol=1e-3), "retain_part='top'"),
        (lambda: BOTTOM(torch.zeros(8, 6), 2), "is zero"),
        (lambda: BOTTOM(torch.eye(8, 3, dtype=torch.float64) @ torch.eye(3, 6).double(), 4), "zer"),
    ],
)
def test_bad(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_mica_of_a_weight_of_small_rank(device):
    """B is orthonormal, and orthogonal to all that W has."""
    W = (torch.randn(40, 10) @ torch.randn(10, 28)).to(device)
    B = to_numpy(MiCA()(W, R).lora_B)
    assert np.abs(B.T @ B - np.eye(R)).max() <= 1e-5
    assert np.abs(B.T @ to_numpy(W)).max() <= 1e-4


def test_grows_with_scaling():
    for name in ("orthogonal", "mica", "kasa"):
        initializer = get_initializer(name)
        assert not initializer.grows_with_scaling
        LoRAConfig(r=2, scaling="alpha_sqrt", init_lora_weights=name)


@needs_real_model
def test_real_weights(real_linears, device):
    W = real_linears[0].weight.detach().to(device)
    U, S, Vh = np.linalg.svd(to_numpy(W), full_matrices=False)
    B = to_numpy(MiCA()(W, 8).lora_B)
    assert np.linalg.norm(B - U[:, -8:] @ (U[:, -8:].T @ B)) <= 1e-3
    start = KaSA(seed=0)(W, 8, 2.0)
    A0, B0 = map(to_numpy, start.taken)
    want = U[:, -8:] * S[-8:] @ Vh[-8:]
    assert np.linalg.norm(2 * B0 @ A0 - want) <= 1e-3 * np.linalg.norm(want)
    bottom = BOTTOM(W, 8)
    got = to_numpy(bottom.lora_B) @ to_numpy(bottom.lora_A)
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)
