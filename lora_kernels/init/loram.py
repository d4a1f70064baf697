"""LoRAM: bases scaled to the weight's magnitude (Zhang et al., "The Primacy of Magnitude in
Low-Rank Adaptation", arXiv 2507.06558).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._utils.checks import as_integer, factor_dtype
from .._utils.errors import unknown_name
from ..ops import svd
from ..ops.loram_init import log_gain
from ..ops.svd._matrices import names
from .base import Initializer, get_initializer, register_initializer
from .start import Start

BASES = ("dst", "orthogonal", "gaussian")
GAINS = ("log", "log_half", "exact")
STATISTICS = ("mean_square", "variance")

_SIGMA_TOLERANCE = 1e-3  # of each σ that gain="exact" adds up: half as much in β


@dataclass(frozen=True)
class LoRAM(Initializer):
    """A₀ = βΦₘᵀ, B₀ = βΦₙ with β⁴ = Q[r] · ν[W] / ν[ΦₙΦₘᵀ], ν the mean square of the entries.

    arXiv 2507.06558, algorithm 1. With the default options Φ is the DST-I basis and
    β² = ‖W‖_F √(Q/r), Q = ln r / ln min(n, m). W changes (W − s·B₀A₀); β does not depend on s.
    Cost: two reads and one write of W, at any rank; gain="exact" adds PiSSA's SVD, `track` the
    other start. The start is made again from one number, β, if the basis is the DST; the others are
    kept as factors.

    The options are the paper's ablations:

    - `basis`: "dst"; "orthogonal", random orthonormal columns; or "gaussian", entries ~ N(0, 1).
      The random ones come from a generator of their own with `seed`; "dst" has no use for it.
    - `gain`: "log", as above, where rank 1 takes Q[2] as Q[1] = 0 would never train; "log_half",
      ln(r/2) / ln min(n, m), for r > 2; or "exact", the spectral gain that they approximate,
      Q[r] = ρ[r] · r / rank(W) with ρ[r] = (mean of the r largest σ)² / mean(σ²) over the rank(W)
      σ that are not zero: (σ₁ + … + σ_r)² / (r ‖W‖²_F), from `lora_kernels.svd.truncated`,
      each σ to 1e-3 of itself.
    - `statistic`: ν is the "mean_square", as in the paper, or the unbiased "variance", as in the
      authors' code: β is then 10 % larger at r = 2 and 1.5 % at r = 16.
    - `track`: another initialiser, a name or an object: the magnitude of its start takes the place
      of Q[r] · ν[W], so that ν[B₀A₀] is ν of its B A.
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
            raise ValueError("track is another initialiser, whose magnitude LoRAM takes: not LoRAM")
        if self.gain != "log":
            raise ValueError(
                f"gain={self.gain!r} has no effect with track, which takes the magnitude of "
                "another start: give one of them"
            )

    @property
    def needs_gradient(self) -> bool:
        """Whether the start that is tracked is made from one."""
        return self.track is not None and get_initializer(self.track).needs_gradient

    @property
    def grows_with_scaling(self) -> bool:
        """Not if it tracks a start that is divided by s."""
        return self.track is None or get_initializer(self.track).grows_with_scaling

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; ValueError if W is zero or holds NaN or Inf, or if it or what is tracked has
        no magnitude.
        """
        bases = self._random_bases(weight, r)
        total, squares = torch.ops.lora.frobenius_stats([weight])[0]
        _check_magnitude(float(squares), "weight")
        size, gain = self._wanted(weight, r, scaling, gradient, total, squares)
        beta = (size * (gain / self._size_of_bases(weight, r, bases))) ** 0.25
        if bases is None:
            return self._dst_start(weight, r, beta, squares)
        dtype = factor_dtype(weight.dtype)
        left, right = ((beta * base).to(dtype) for base in bases)
        return Start(right.T.contiguous(), left, weight_norm=squares.sqrt())

    def starts(
        self,
        weights: Sequence[Tensor],
        r: int,
        scaling: float = 1.0,
        gradients: Sequence[Tensor] | None = None,
    ) -> list[Start]:
        """The starts; of the default options with one pass over all weights, and one wait."""
        if not self._is_default():
            return super().starts(weights, r, scaling, gradients)
        squares = torch.ops.lora.frobenius_stats(list(weights))[:, 1]
        for name, value in zip(names(weights), squares.tolist(), strict=True):
            _check_magnitude(value, name)
        gain = log_gain(r, *weights[0].shape)
        betas = (squares * (gain / r)) ** 0.25
        return [
            self._dst_start(weight, r, beta, square)
            for weight, beta, square in zip(weights, betas, squares, strict=True)
        ]

    def absorb_(
        self, weight: Tensor, r: int, scaling: float, gradient: Tensor | None = None
    ) -> Start:
        """The same start and the subtraction; as one operator with the default options."""
        if self._is_default():
            return Start(*torch.ops.lora.loram_init(weight, r, scaling))
        return super().absorb_(weight, r, scaling, gradient)

    def _is_default(self) -> bool:
        """Whether it is the paper's algorithm 1, which has kernels of its own."""
        return replace(self, seed=0) == LoRAM()

    def _dst_start(self, weight: Tensor, r: int, beta: Tensor, squares: Tensor) -> Start:
        rows, cols = weight.shape
        options = {"dtype": factor_dtype(weight.dtype), "device": weight.device, "scale": beta}
        lora_A = torch.ops.lora.dst_basis(cols, r, **options).T.contiguous()
        lora_B = torch.ops.lora.dst_basis(rows, r, **options)
        return Start(lora_A, lora_B, beta, weight_norm=squares.sqrt())

    def _random_bases(self, weight: Tensor, r: int) -> tuple[Tensor, Tensor] | None:
        """[n, r] and [m, r] float64, one after the other from one generator; None for the DST."""
        if self.basis == "dst":
            return None
        generator = torch.Generator(weight.device).manual_seed(int(self.seed))
        options = {"dtype": torch.float64, "device": weight.device, "generator": generator}
        left, right = (torch.randn(size, r, **options) for size in weight.shape)
        if self.basis == "gaussian":
            return left, right
        return _orthonormal(left), _orthonormal(right)

    def _wanted(
        self,
        weight: Tensor,
        r: int,
        scaling: float,
        gradient: Tensor | None,
        total: Tensor,
        squares: Tensor,
    ) -> tuple[Tensor, Tensor | float]:
        """The size that B₀A₀ is to have, as a size and a factor to it, from the sums over W."""
        if self.track is None:
            return self._size(total, squares, weight, "weight"), self._gain(weight, r, squares)
        tracked = get_initializer(self.track)
        start = tracked(weight, r, scaling, gradient)
        total, squares = _product_sums(start.lora_B, start.right())
        if not bool(squares > 0):
            raise ValueError(
                f"{type(tracked).__name__} starts at zero: there is no magnitude to track"
            )
        return self._size(total, squares, weight, "the start that is tracked"), 1.0

    def _gain(self, weight: Tensor, r: int, squares: Tensor) -> Tensor | float:
        """Q[r]."""
        if self.gain == "log":
            return log_gain(r, *weight.shape)
        if self.gain == "exact":
            sigma = svd.truncated(weight, r, tol=_SIGMA_TOLERANCE).S.double()
            return sigma.sum() ** 2 / (r * squares)
        if r <= 2:
            raise ValueError(
                f"gain='log_half' is ln(r/2) / ln min(n, m), which is not positive for r = {r}; "
                "take r > 2 or gain='log'"
            )
        return math.log(r / 2) / math.log(min(weight.shape))

    def _size_of_bases(
        self, weight: Tensor, r: int, bases: tuple[Tensor, Tensor] | None
    ) -> Tensor | int:
        """That of ΦₙΦₘᵀ, which is not formed."""
        if bases is None:
            if self.statistic == "mean_square":
                return r  # the columns are orthonormal
            options = {"dtype": torch.float64, "device": weight.device}
            bases = tuple(torch.ops.lora.dst_basis(size, r, **options) for size in weight.shape)
        return self._size(*_product_sums(bases[0], bases[1].T), weight, "the product of the bases")

    def _size(self, total: Tensor, squares: Tensor, weight: Tensor, name: str) -> Tensor:
        """ν of a matrix of `weight`'s shape, but for the division by the number of entries, which
        cancels, from the sum of its entries and that of their squares.
        """
        if self.statistic == "mean_square":
            return squares
        size = squares - total**2 / weight.numel()
        if not bool(size > 1e-12 * squares):  # rounding
            raise ValueError(
                f"{name} has variance zero, which gives no scale; take statistic='mean_square'"
            )
        return size


def _check_magnitude(squares: float, name: str) -> None:
    """Raises unless the sum of squares gives a scale."""
    if not math.isfinite(squares):
        raise ValueError(f"{name} holds NaN or Inf: it has no magnitude to start from")
    if squares == 0:
        raise ValueError(f"{name} is zero, so its magnitude gives no scale")


def _product_sums(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the sum of squares of the entries of left [n, r] · right [r, m], unformed."""
    left, right = left.double(), right.double()
    return left.sum(0) @ right.sum(1), ((left.T @ left) * (right @ right.T)).sum()


def _orthonormal(columns: Tensor) -> Tensor:
    """Q of the QR with R's diagonal positive: uniformly distributed if the columns are normal."""
    Q, R = torch.linalg.qr(columns)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0).to(Q.dtype)


register_initializer("loram", LoRAM)
