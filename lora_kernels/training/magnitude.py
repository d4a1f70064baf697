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
from ..init.sharded.layout import is_sharded, local_part
from ..init.sharded.whole import whole
from ..layers.adapted import AdaptedLayer
from ..model.experts.stack import AdaptedStack, ExpertView
from ..model.selection import Targets, find_targets
from ..ops import svd
from ..ops.loram_init import log_gain


@dataclass(frozen=True)
class LayerMagnitude:
    """The magnitudes of one weight W [out, in] = [n, m], and of starts of rank r.

    Undefined values are NaN: if W is zero or not finite, or if r > min(n, m).

    Attributes:
        name: the layer.
        out_features: n, the rows of W.
        in_features: m, the columns of W.
        r: the rank.
        scaling: s of the layer.
        nu_weight: ν[W].
        rank: the numerical rank, the number of singular values σ above rounding errors; min(n, m)
            if not all of them were computed.
        rho: ρ[r] = (mean of the r largest σ)² / (mean of all σ²).
        gain: the exact Q[r] = ρ[r] · r / rank, computed as (Σ of the r largest σ)² / (r ‖W‖_F²),
            which does not depend on the numerical rank.
        log_gain: ln r / ln min(n, m), LoRAM's approximation of Q[r] (Q[2] is used for r = 1).
        beta: LoRAM's β, β² = ‖W‖_F √(log_gain / r).
        start_ratio: ‖s·B₀A₀‖_F / ‖W‖_F, with the adapted layer's initial factors, else LoRAM's.
        k1_lora: k₁ of proposition 2, `growth(ν[A₀], ν[B₀], n, m, r)`, for LoRA: r / 9m, because
            PEFT's A ~ U(±1/√m) has variance 1 / 3m (the paper's r / m assumes variance 1 / m).
        k1_pissa: k₁ for PiSSA, whose factors are divided by √s: gain · (m + n) ν[W] / s².
        k1_loram: k₁ for LoRAM: log_gain · (m + n) ν[W].
        nu_update: ν[ΔW] of an adapted layer, ΔW = s(BA − B₀A₀); None for other layers.
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
    """The magnitudes of one layer of an adapter: A [r, in], B [out, r] and their product.

    `nu_A`, `nu_B` and `nu_update` are ν[A], ν[B] and ν[s·BA]; `norm_update` is ‖s·BA‖_F. If the
    initial B₀A₀ was not zero, the update of W is s·(BA − B₀A₀), not s·BA. DoRA's magnitudes do not
    affect these numbers.
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
    tensor = _gathered(tensor).detach()
    return float(torch.ops.lora.frobenius_stats([tensor])[0, 1]) / tensor.numel()


def growth(nu_A: float, nu_B: float, out_features: int, in_features: int, r: int) -> float:
    """k₁ = r(m ν[A]² + n ν[B]²) for A [r, m] and B [n, r] (arXiv 2507.06558, proposition 2).

    With plain SGD at the learning rate η, ν[ΔW] grows by γk₁ per step, where γ = η²s⁴ν[∇_W L], as
    long as A and B are near their initial values, and if the gradients are isotropic and
    independent of each other.
    """
    return r * (in_features * nu_A**2 + out_features * nu_B**2)


@torch.no_grad()
def adam_growth(
    lora_A: Tensor,
    lora_B: Tensor,
    lora_R: Tensor | None = None,
    lora_diag: Tensor | None = None,
    *,
    trains: str = "AB",
    ratio: float = 1.0,
) -> float:
    """The expected ν[d(BA)] if each trained entry of A [r, m] and B [n, r] moves by ±1.

    This is k₁ of `growth` for Adam, whose first steps move each entry by about the learning rate,
    whatever its gradient. With the rate η, one step changes W by a matrix of mean square about
    s²η² · `adam_growth`, if the signs are independent of each other. The value is r(ν[A] + ν[B]) if
    both factors train, from ν[dB·A] + ν[B·dA]; it is r²ν[A]ν[B] if `lora_R` [r, r] trains between
    frozen factors. Training W itself would have the value 1. With `lora_diag` λ [r], which trains
    too, the product is B diag(λ) A.

    Args:
        lora_A: A₀.
        lora_B: B₀.
        lora_R: R₀, whose values do not matter.
        lora_diag: λ₀.
        trains: "AB", or "A" if B is frozen. If `lora_R` is given, only R trains.
        ratio: B's learning rate divided by A's (LoRA+); η is the rate of A, and of λ.

    """
    A, B = _gathered(lora_A), _gathered(lora_B)
    r = A.shape[0]
    if lora_R is not None:
        return r * r * mean_square(A) * mean_square(B)
    growth_diag = 0.0
    if lora_diag is not None:
        rows, columns = A.double().square().mean(1), B.double().square().mean(0)  # [r]
        growth_diag = float(rows @ columns)
        diag = _gathered(lora_diag)
        A, B = diag[:, None] * A, B * diag
    growth_B = ratio**2 * mean_square(A) if "B" in trains else 0.0
    return r * (growth_B + mean_square(B)) + growth_diag


@torch.no_grad()
def product_mean_square(lora_A: Tensor, lora_B: Tensor) -> float:
    """ν[BA] of A [r, m] and B [n, r] from their r × r Gram matrices in float64:
    ‖BA‖_F² = ⟨BᵀB, AAᵀ⟩.
    """
    A, B = _gathered(lora_A).to(torch.float64), _gathered(lora_B).to(torch.float64)
    # Rounding may make this sum of squares slightly negative.
    return max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0) / (A.shape[1] * B.shape[0])


@torch.no_grad()
def update_mean_square(layer: AdaptedLayer | ExpertView) -> float:
    """ν[ΔW] of an adapted layer, ΔW = s(BA − B₀A₀), with BRA for BA if the layer trains an R. For a
    DoRA layer, ΔW is the update before the rows get the norms m.

    No matrix of W's size is formed. ΔW is computed as s((B − B₀)A + B₀(A − A₀)), because BA − B₀A₀
    would lose digits by cancellation while the update is small compared with s·B₀A₀.
    """
    A, B = _gathered(layer.lora_A).to(torch.float64), _gathered(layer.lora_B).to(torch.float64)
    start, R = layer.start_factors(), layer.middle()
    if R is not None:
        A = _gathered(R).to(torch.float64) @ A
    if start is not None:
        A0, B0 = (_gathered(factor).to(torch.float64) for factor in start)
        A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)  # [2r, in], [out, 2r]
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
    """The magnitudes of one weight [out, in].

    Args:
        weight: a float64, float32, bfloat16 or float16 matrix; for 16-bit weights, the computations
            are in float32.
        r: rank of the starts, at least 1.
        scaling: s, positive.
        method: "exact" computes all singular values with LAPACK or cuSOLVER; "randomized" computes
            the r largest with `lora_kernels.svd.truncated`; the results are never too large, and a
            few per mille too small if the singular values decay slowly.
        seed: the seed of "randomized".
        name: the name in the result and in error messages.

    Raises:
        ValueError: an unknown method, a rank or scaling out of range, or a weight that is empty or
            not a matrix.
        TypeError: an argument or a weight of the wrong type.

    """
    svd.check_options(method)
    r, seed = _checked(r, scaling), as_integer(seed, "seed")
    weight = _gathered(weight)
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
    start = log if real else math.nan  # LoRAM's ‖B₀A₀‖_F² / ‖W‖_F²
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
    layer: AdaptedLayer | ExpertView, *, method: str = "exact", seed: int = 0, name: str = ""
) -> LayerMagnitude:
    """The magnitudes of an adapted layer, or of one of the `expert_views` of a stack: its base
    weight, its own initial factors and its update.

    The arguments and errors are those of `measure`.
    """
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
    """The magnitudes of every target of a model, in the model's order.

    `r` and `scaling` are for layers that are not adapted; adapted layers have their own. `targets`
    is as in `lora_kernels.model.selection.find_targets`; the other arguments and the errors are as
    in `measure`. A weight that several modules share has a row for each module. A 3-D parameter of
    experts, if `targets` names it, has a row "name[e]" for each expert.

    If the model is sharded, all processes must call this function: the weights are gathered one
    after the other, and every process gets all rows.
    """
    svd.check_options(method)
    _checked(r, scaling)
    rows = []
    for name, base in tracked(find_targets(model, targets).items(), "layers", progress):
        several = base.num_experts is not None
        layers: list[AdaptedLayer | ExpertView | Tensor]
        if isinstance(base.module, AdaptedStack):
            layers = [*base.module.expert_views()]
        elif isinstance(base.module, AdaptedLayer):
            layers = [base.module]
        elif base.sharded:
            weight = _gathered(base.stored_weight)
            weight = weight.mT if base.transposed else weight
            layers = [*weight.unbind()] if several else [weight]
        else:
            layers = [*base.matrices()]
        for e, layer in enumerate(layers):
            own = f"{name}[{e}]" if several else name
            if isinstance(layer, Tensor):
                rows.append(measure(layer, r, scaling, method=method, seed=seed, name=own))
            else:
                rows.append(measure_layer(layer, method=method, seed=seed, name=own))
    return rows


def measure_adapter(name: str, lora_A: Tensor, lora_B: Tensor, scaling: float) -> AdapterMagnitude:
    """The magnitudes of A [r, in], B [out, r] and s·BA, with s = `scaling`.

    Raises:
        ValueError: the shapes of A and B do not fit, or `scaling` is not finite.
        TypeError: a factor of the wrong type.

    """
    lora_A, lora_B = _gathered(lora_A), _gathered(lora_B)
    check_weight(lora_A, f"{name}.lora_A")
    check_weight(lora_B, f"{name}.lora_B")
    check_finite(scaling, "scaling")
    (r, m), (n, r_B) = lora_A.shape, lora_B.shape
    if r != r_B or not r * m * n:
        raise ValueError(
            f"{name}: lora_A {[r, m]} and lora_B {[n, r_B]} do not make a product B·A: "
            "their ranks differ, or a size is 0"
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


def _gathered(tensor: Tensor) -> Tensor:
    """The whole tensor if it is sharded, gathered by all processes; any other tensor as it is."""
    return whole(tensor).to(local_part(tensor).device) if is_sharded(tensor) else tensor


def _checked(r: int, scaling: float) -> int:
    r = as_integer(r, "r", minimum=1)
    check_positive(scaling, "scaling")
    return r


def _singular_values(weight: Tensor, r: int, method: str, seed: int) -> tuple[Tensor, int]:
    """All σ or the r largest, descending, in float64 on the CPU; and the numerical rank."""
    if method == "randomized":
        sigma = svd.truncated(weight, r, seed=seed).S
        return sigma.to("cpu", torch.float64), min(weight.shape)
    sigma = torch.linalg.svdvals(weight.to(factor_dtype(weight.dtype)))
    # NumPy's rule: a σ of at most this size is zero except for rounding.
    noise = max(weight.shape) * torch.finfo(sigma.dtype).eps * sigma[0]
    return sigma.to("cpu", torch.float64), int((sigma > noise).sum())


def _powers_of_two(limit: int) -> Iterable[int]:
    return (1 << k for k in range(limit.bit_length()))
