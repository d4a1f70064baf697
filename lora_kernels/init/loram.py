"""LoRAM: bases scaled to the weight's magnitude (Zhang et al., "The Primacy of Magnitude in
Low-Rank Adaptation", arXiv 2507.06558).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import as_integer
from .._utils.errors import unknown_name
from ..ops import svd
from ..ops.loram_init import log_gain, shortened
from ..ops.svd._matrices import names
from .base import Initializer, get_initializer, refuse_sharded, register_initializer
from .start import Start, StartRequest, batched, stats

BASES = ("dst", "orthogonal", "gaussian")
GAINS = ("log", "log_half", "exact")
STATISTICS = ("mean_square", "variance")

_SIGMA_TOLERANCE = 1e-3  # relative, of each σ that gain="exact" sums; of β, half of it


@dataclass(frozen=True)
class LoRAM(Initializer):
    """A₀ = βΦₘᵀ, B₀ = βΦₙ with β⁴ = Q[r] · ν[W] / ν[ΦₙΦₘᵀ], ν the mean square of the entries.

    arXiv 2507.06558, algorithm 1. With the default options Φ is the DST-I basis and
    β² = ‖W‖_F √(Q/r), Q = ln r / ln min(n, m). W changes (W − s·B₀A₀); β does not depend on s.
    Cost: two reads and one write of W, at any rank; gain="exact" adds PiSSA's SVD, `track` the cost
    of the other start. With the DST basis, the recipe is the one number β; with the other bases the
    layer stores the initial factors. ValueError if W is zero or holds NaN or Inf, or if the tracked
    start has no magnitude.

    The options are the paper's ablations:

    - `basis`: "dst"; "orthogonal", random orthonormal columns; or "gaussian", entries ~ N(0, 1).
      The random bases come from a separate generator, seeded with `seed`; "dst" ignores `seed`.
    - `gain`: "log", as above, where rank 1 uses Q[2], because with Q[1] = 0 it would never train;
      "log_half", ln(r/2) / ln min(n, m), for r > 2; or "exact", the spectral gain that both
      approximate: Q[r] = ρ[r] · r / rank(W), where ρ[r] = (mean of the r largest σ)² / mean(σ²),
      over the rank(W) nonzero σ. That is (σ₁ + … + σ_r)² / (r ‖W‖²_F), from
      `lora_kernels.svd.truncated` with each σ accurate to 1e-3.
    - `statistic`: ν is the "mean_square", as in the paper, or the unbiased "variance", as in the
      authors' code: β is then 10 % larger at r = 2 and 1.5 % at r = 16.
    - `track`: another initializer, a name or an object, whose B A sets the magnitude: ν of that
      product replaces Q[r] · ν[W], so that ν[B₀A₀] equals it.
    """

    basis: str = "dst"
    gain: str = "log"
    statistic: str = "mean_square"
    track: str | Initializer | None = None
    seed: int = 0
    changes_base = True
    reads_weight = True

    def __post_init__(self) -> None:
        for option, allowed in (("basis", BASES), ("gain", GAINS), ("statistic", STATISTICS)):
            value = getattr(self, option)
            if value not in allowed:
                raise unknown_name(option, value, allowed)
        as_integer(self.seed, "seed")
        if self.track is None:
            return
        if isinstance(get_initializer(self.track), LoRAM):
            raise ValueError(
                "track must be an initializer other than LoRAM, which takes its magnitude"
            )
        if self.gain != "log":
            raise ValueError(
                f"gain={self.gain!r} has no effect with track, which takes the magnitude of "
                "another start: give only one of the two"
            )
        # Not a field: it follows from `track`.
        object.__setattr__(self, "needs_gradient", get_initializer(self.track).needs_gradient)

    @property
    def grows_with_scaling(self) -> bool:
        """True unless a start is tracked that is divided by s."""
        return self.track is None or get_initializer(self.track).grows_with_scaling

    @property
    def reads_entries(self) -> bool:
        """False unless the gain is exact or another start is tracked."""
        return self.gain == "exact" or self.track is not None

    @property
    def has_recipe(self) -> bool:  # type: ignore[override]
        """True for the DST basis."""
        return self.basis == "dst"

    @property
    def draws_unseeded(self) -> bool | None:
        """As for the tracked start; False if none is tracked."""
        return False if self.track is None else get_initializer(self.track).draws_unseeded

    def make_start(self, request: StartRequest) -> Start:
        bases = self._random_bases(request)
        total, squares = request.stats()
        _check_magnitude(float(squares), "weight")
        size, gain = self._wanted(request, total, squares)
        beta = (size * (gain / self._size_of_bases(request, bases))) ** 0.25
        beta = shortened(beta, request.weight.dtype)
        if bases is None:
            return _dst_starts(request, beta.reshape(1), squares.reshape(1))[0]
        left, right = ((beta * base).to(request.factor_dtype) for base in bases)
        return Start(right.T.contiguous(), left, weight_norm=squares.sqrt())

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        """With the default options, one pass over all weights and one wait for the device."""
        if not self._is_default():
            return super().make_starts(requests)
        weights, r, _ = batched(requests)
        squares = stats(requests)[:, 1]
        for name, value in zip(names(weights), squares.tolist(), strict=True):
            _check_magnitude(value, name)
        betas = (squares * (log_gain(r, *requests[0].shape) / r)) ** 0.25
        betas = shortened(betas, weights[0].dtype)
        return _dst_starts(requests[0], betas, squares)

    def absorb_(
        self,
        weight: Tensor,
        r: int,
        scaling: float,
        gradient: Tensor | None = None,
        activations: Any = None,
    ) -> Start:
        """The start and its subtraction; with the default options, one operator does both."""
        refuse_sharded(weight)
        if self._is_default():
            return Start(*torch.ops.lora.loram_init(weight, r, scaling))
        return super().absorb_(weight, r, scaling, gradient)

    def _is_default(self) -> bool:
        """Whether this is the paper's algorithm 1, which has its own kernels."""
        return replace(self, seed=0) == LoRAM()

    def _random_bases(self, request: StartRequest) -> tuple[Tensor, Tensor] | None:
        """[n, r] and [m, r] float64, in this order from one generator; None for the DST."""
        if self.basis == "dst":
            return None
        device = request.weight.device
        generator = torch.Generator(device).manual_seed(int(self.seed))
        left, right = (
            torch.randn(size, request.r, generator=generator, dtype=torch.float64, device=device)
            for size in request.shape
        )
        if self.basis == "gaussian":
            return left, right
        return _orthonormal(left), _orthonormal(right)

    def _wanted(
        self, request: StartRequest, total: Tensor, squares: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """The target size of B₀A₀, as (size, factor), from the sums over W."""
        weight = request.weight
        if self.track is None:
            return self._size(total, squares, weight, "weight"), self._gain(request, squares)
        tracked = get_initializer(self.track)
        start = tracked(weight, request.r, request.scaling, request.gradient)
        total, squares = _product_sums(start.lora_B, start.right())
        if not bool(squares > 0):
            raise ValueError(
                f"{type(tracked).__name__} starts at zero: there is no magnitude to track"
            )
        return self._size(total, squares, weight, "the start that is tracked"), 1.0

    def _gain(self, request: StartRequest, squares: Tensor) -> Tensor | float:
        """Q[r]."""
        r = request.r
        if self.gain == "log":
            return log_gain(r, *request.shape)
        if self.gain == "exact":
            sigma = svd.truncated(request.weight, r, tol=_SIGMA_TOLERANCE).S.double()
            return sigma.sum() ** 2 / (r * squares)
        if r <= 2:
            raise ValueError(
                f"gain='log_half' is ln(r/2) / ln min(n, m), which is not positive for r = {r}; "
                "take r > 2 or gain='log'"
            )
        return math.log(r / 2) / math.log(min(request.shape))

    def _size_of_bases(
        self, request: StartRequest, bases: tuple[Tensor, Tensor] | None
    ) -> Tensor | int:
        """The size of ΦₙΦₘᵀ, without forming this product."""
        r, weight = request.r, request.weight
        if bases is None:
            if self.statistic == "mean_square":
                return r  # the columns are orthonormal
            options = {"dtype": torch.float64, "device": weight.device}
            left, right = (torch.ops.lora.dst_basis(size, r, **options) for size in request.shape)
        else:
            left, right = bases
        return self._size(*_product_sums(left, right.T), weight, "the product of the bases")

    def _size(self, total: Tensor, squares: Tensor, weight: Tensor, name: str) -> Tensor:
        """ν times the number of entries (which cancels) of a matrix of `weight`'s shape, from the
        sum and the sum of squares of its entries.
        """
        if self.statistic == "mean_square":
            return squares
        size = squares - total**2 / weight.numel()
        if not bool(size > 1e-12 * squares):  # zero up to rounding
            raise ValueError(
                f"{name} has variance zero, which gives no scale; take statistic='mean_square'"
            )
        return size


def _dst_starts(first: StartRequest, betas: Tensor, squares: Tensor) -> list[Start]:
    """The DST starts of weights like that of `first`, from one computation of the bases.

    The products with β are in float64 and rounded once: the bits of `dst_basis` with `scale`.
    """
    (rows, cols), device = first.shape, first.weight.device
    left, right = (
        torch.ops.lora.dst_basis(size, first.r, dtype=torch.float64, device=device)
        for size in (rows, cols)
    )
    right = right.T.contiguous()  # [r, m]
    return [
        Start(
            (right * beta).to(first.factor_dtype),
            (left * beta).to(first.factor_dtype),
            beta,
            weight_norm=square.sqrt(),
        )
        for beta, square in zip(betas, squares, strict=True)
    ]


def _check_magnitude(squares: float, name: str) -> None:
    """Raise unless the sum of squares of a weight is finite and not zero."""
    if not math.isfinite(squares):
        raise ValueError(f"{name} holds NaN or Inf: it has no magnitude to start from")
    if squares == 0:
        raise ValueError(f"{name} is zero, so its magnitude gives no scale")


def _product_sums(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the sum of squares of the entries of left [n, r] · right [r, m], which is not
    formed.
    """
    left, right = left.double(), right.double()
    return left.sum(0) @ right.sum(1), ((left.T @ left) * (right @ right.T)).sum()


def _orthonormal(columns: Tensor) -> Tensor:
    """Q of the QR whose R has a positive diagonal: uniformly distributed for normal columns."""
    Q, R = torch.linalg.qr(columns)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q.dtype)


register_initializer("loram", LoRAM)
