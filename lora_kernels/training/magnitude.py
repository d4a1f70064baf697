"""Magnitudes of weights, starts and updates, layer by layer.

The quantities are those of LoRAM (Zhang et al., "The Primacy of Magnitude in Low-Rank Adaptation",
arXiv 2507.06558), whose statistic is the mean square ν[X] = ‖X‖_F² / (number of entries of X).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .._utils.checks import as_integer, check_finite, check_positive, check_weight, factor_dtype
from .._utils.names import ALL_LINEAR
from .._utils.progress import tracked
from ..layers.adapted import AdaptedLayer
from ..model.selection import Targets, find_targets
from ..ops import svd
from ..ops.loram_init import log_gain


@dataclass(frozen=True)
class LayerMagnitude:
    """One weight W [out, in] = [n, m], and what starts of rank r make of it.

    NaN where a value does not exist: a weight that is zero or not finite, or r > min(n, m).

    Attributes:
        name, out_features, in_features, r: which layer, and at which rank.
        scaling: s.
        nu_weight: ν[W].
        rank: the number of singular values that are not zero but for rounding; min(n, m) if they
            were not all computed.
        rho: ρ[r] = (mean of the r largest σ)² / (mean of all σ²).
        gain: Q[r] = ρ[r] · r / rank, exact; (Σ of the r largest σ)² / (r ‖W‖_F²), so that no rank
            has to be decided.
        log_gain: ln r / ln min(n, m), with which LoRAM replaces it (Q[1] taken as Q[2]).
        beta: LoRAM's β, β² = ‖W‖_F √(log_gain / r).
        start_ratio: ‖s·B₀A₀‖_F / ‖W‖_F; of the layer's own start if it is adapted, else of LoRAM's.
        k1_lora, k1_pissa, k1_loram: k₁ of proposition 2, `growth(ν[A₀], ν[B₀], n, m, r)`: r / 9m,
            as PEFT's A ~ U(±1/√m) has a variance of 1 / 3m (the paper's r / m is that of 1 / m);
            gain · (m + n) ν[W] / s², as PiSSA's factors are divided by √s; log_gain · (m + n) ν[W].
        nu_update: ν[ΔW] of an adapted layer, ΔW = s(BA − B₀A₀); None of any other.
        gains: (k, exact Q[k]) for powers of two up to the number of σ that were computed.

    """

    name: str
    out_features: int
    in_features: int
    r: int
    scaling: float
    nu_weight: float
    rank: int | None
    rho: float
    gain: float
    log_gain: float
    beta: float
    start_ratio: float
    k1_lora: float
    k1_pissa: float
    k1_loram: float
    nu_update: float | None = None
    gains: tuple[tuple[int, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class AdapterMagnitude:
    """One pair of an adapter: A [r, in], B [out, r] and their product.

    `nu_A`, `nu_B` and `nu_update` are ν[A], ν[B] and ν[s·BA], `norm_update` is ‖s·BA‖_F. An adapter
    that did not start at zero has moved from its start by less than s·BA.
    """

    name: str
    out_features: int
    in_features: int
    r: int
    scaling: float
    nu_A: float
    nu_B: float
    nu_update: float
    norm_update: float


def mean_square(tensor: Tensor) -> float:
    """ν[X] of a matrix, summed in float64."""
    return float(torch.ops.lora.frobenius_stats([tensor.detach()])[0, 1]) / tensor.numel()


def growth(nu_A: float, nu_B: float, out_features: int, in_features: int, r: int) -> float:
    """k₁ = r(m ν[A]² + n ν[B]²), A [r, m], B [n, r] (arXiv 2507.06558, proposition 2).

    Under plain SGD at the learning rate η, ν[ΔW] grows by γk₁ a step, γ = η²s⁴ν[∇_W L], while A
    and B are near their start, if the gradients are isotropic and independent of each other.
    """
    return r * (in_features * nu_A**2 + out_features * nu_B**2)


@torch.no_grad()
def product_mean_square(lora_A: Tensor, lora_B: Tensor) -> float:
    """ν[BA] of A [r, m] and B [n, r] from their r × r Gram matrices in float64:
    ‖BA‖_F² = ⟨BᵀB, AAᵀ⟩.
    """
    A, B = lora_A.to(torch.float64), lora_B.to(torch.float64)
    # Rounding may leave a negative zero of a sum of squares.
    return max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0) / (A.shape[1] * B.shape[0])


@torch.no_grad()
def update_mean_square(layer: AdaptedLayer) -> float:
    """ν[ΔW] of an adapted layer, ΔW = s(BA − B₀A₀), without forming a product of W's size; s·BRA
    if the layer trains an R between the two.

    As s((B − B₀)A + B₀(A − A₀)): the difference of the products themselves would cancel while the
    update is small beside the start.
    """
    A, B = layer.lora_A.to(torch.float64), layer.lora_B.to(torch.float64)
    start, R = layer.start_factors(), layer.lora_R
    if R is not None:
        A = R.to(torch.float64) @ A
    if start is not None:
        A0, B0 = (factor.to(torch.float64) for factor in start)
        A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
    return layer.scaling**2 * product_mean_square(A, B)


@torch.no_grad()
def measure(
    weight: Tensor,
    r: int = 16,
    scaling: float = 1.0,
    *,
    method: str = "exact",
    seed: int = 0,
    name: str = "",
) -> LayerMagnitude:
    """The magnitudes of one weight [out, in], which is only read.

    Args:
        weight: float64, float32, bfloat16 or float16; 16-bit ones are worked on in float32.
        r: rank of the starts, at least 1.
        scaling: s, positive.
        method: "exact", all singular values by LAPACK or cuSOLVER; or "randomized", the r largest
            by `lora_kernels.svd.truncated`: never too large, and some per mille too small on slowly
            decaying spectra.
        seed: of "randomized".
        name: the row's.

    Raises:
        ValueError: an unknown method, a rank or scaling out of range, no matrix.
        TypeError: an argument or a weight of the wrong type.

    """
    svd.check_options(method)
    r, seed = _checked(r, scaling), as_integer(seed, "seed")
    check_weight(weight, name or "weight")
    n, m = weight.shape
    if not n or not m:
        raise ValueError(f"{name or 'weight'} is empty, shape [{n}, {m}]")
    nu = mean_square(weight)
    squares = nu * n * m
    real = math.isfinite(squares) and squares > 0
    fits = r <= min(n, m)
    log = log_gain(r, n, m) if fits else math.nan
    rank, rho, gain = None, math.nan, math.nan
    gains: tuple[tuple[int, float], ...] = ()
    if real and (fits or method == "exact"):
        sigma, rank = _singular_values(weight, r, method, seed)
        ranks = torch.arange(1, len(sigma) + 1, dtype=torch.float64)
        curve = sigma.cumsum(0) ** 2 / (ranks * squares)
        gains = tuple((k, float(curve[k - 1])) for k in _powers_of_two(len(sigma)))
        if fits:
            gain = float(curve[r - 1])
            rho = gain * rank / r
    start = log if real else math.nan  # ‖B₀A₀‖² / ‖W‖² of LoRAM
    return LayerMagnitude(
        name=name,
        out_features=n,
        in_features=m,
        r=r,
        scaling=scaling,
        nu_weight=nu,
        rank=rank,
        rho=rho,
        gain=gain,
        log_gain=log,
        beta=(squares * start / r) ** 0.25,
        start_ratio=scaling * math.sqrt(start),
        k1_lora=r / (9 * m) if fits else math.nan,
        k1_pissa=gain * (m + n) * nu / scaling**2,
        k1_loram=start * (m + n) * nu,
        gains=gains,
    )


def measure_layer(
    layer: AdaptedLayer, *, method: str = "exact", seed: int = 0, name: str = ""
) -> LayerMagnitude:
    """The magnitudes of an adapted layer: of its base weight, its own start, and its update."""
    row = measure(layer.base_weight(), layer.r, layer.scaling, method=method, seed=seed, name=name)
    start, ratio = layer.start_factors(), 0.0
    if start is not None:
        nu = product_mean_square(*start)
        ratio = layer.scaling * math.sqrt(nu / row.nu_weight) if row.nu_weight else math.nan
    return replace(row, start_ratio=ratio, nu_update=update_mean_square(layer))


def inspect_model(
    model: nn.Module,
    r: int = 16,
    scaling: float = 1.0,
    *,
    targets: Targets = ALL_LINEAR,
    method: str = "exact",
    seed: int = 0,
    progress: bool = True,
) -> list[LayerMagnitude]:
    """A row for every target of a model, one after the other.

    `r` and `scaling` are those of layers that are not adapted yet; adapted layers have their own.
    `targets` as in `lora_kernels.model.selection.find_targets`, the rest and what is raised as in
    `measure`. A weight that several modules share has a row for each.
    """
    svd.check_options(method)
    _checked(r, scaling)
    rows = []
    for name, base in tracked(find_targets(model, targets).items(), "layers", progress):
        if isinstance(base.module, AdaptedLayer):
            rows.append(measure_layer(base.module, method=method, seed=seed, name=name))
        else:
            rows.append(measure(base.weight(), r, scaling, method=method, seed=seed, name=name))
    return rows


def measure_adapter(name: str, lora_A: Tensor, lora_B: Tensor, scaling: float) -> AdapterMagnitude:
    """The magnitudes of one pair A [r, in], B [out, r].

    Raises:
        ValueError: the two do not fit each other, or a scaling that is not finite.
        TypeError: a factor of the wrong type.

    """
    check_weight(lora_A, f"{name}.lora_A")
    check_weight(lora_B, f"{name}.lora_B")
    check_finite(scaling, "scaling")
    (r, m), (n, r_B) = lora_A.shape, lora_B.shape
    if r != r_B or not r * m * n:
        raise ValueError(
            f"{name}: lora_A {[r, m]} and lora_B {[n, r_B]} do not make a product B·A of some rank"
        )
    nu = scaling**2 * product_mean_square(lora_A, lora_B)
    return AdapterMagnitude(
        name=name,
        out_features=n,
        in_features=m,
        r=r,
        scaling=scaling,
        nu_A=mean_square(lora_A),
        nu_B=mean_square(lora_B),
        nu_update=nu,
        norm_update=math.sqrt(nu * n * m),
    )


def _checked(r: int, scaling: float) -> int:
    r = as_integer(r, "r")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    check_positive(scaling, "scaling")
    return r


def _singular_values(weight: Tensor, r: int, method: str, seed: int) -> tuple[Tensor, int]:
    """(σ descending, float64 on the CPU, all or the r largest; the rank)."""
    if method == "randomized":
        sigma = svd.truncated(weight, r, seed=seed).S
        return sigma.to("cpu", torch.float64), min(weight.shape)
    sigma = torch.linalg.svdvals(weight.to(factor_dtype(weight.dtype)))
    # NumPy's rule: what rounding may leave of a zero.
    noise = max(weight.shape) * torch.finfo(sigma.dtype).eps * sigma[0]
    return sigma.to("cpu", torch.float64), int((sigma > noise).sum())


def _powers_of_two(limit: int) -> Iterable[int]:
    return (1 << k for k in range(limit.bit_length()))
