"""Starts from a factorisation of the weight: PiSSA, MiLoRA, OLoRA, LoRA-XS.

All but LoRA-XS take s·BA out of the weight. The factors have no recipe: a layer keeps them, so that
its base and a reload are exact, whatever an SVD would give the next time.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.checks import as_integer, check_finite, check_positive
from ..ops import svd
from ..ops.svd._matrices import names
from ..ops.svd.randomized_svd import check_tolerance
from .base import Initializer, register_initializer
from .start import Start

# Against the largest entry. A and B are its root: a millionth of the usual, which trains no more.
_ZERO = 1e-12


class _Spectral(Initializer):
    """Starts that are made of many weights at once as well: a GPU factorises them as a batch."""

    reads_weight = True

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start of one weight, with the errors that its class tells of."""
        return self.starts([weight], r, scaling)[0]


@dataclass(frozen=True)
class _Leading(_Spectral):
    """What starts from the largest singular triplets share: the options of
    `lora_kernels.svd.truncated`. ValueError if a weight holds NaN or Inf, or has a rank less than
    r: what lies beyond it would be zero in A, and never train.
    """

    method: str = "randomized"
    seed: int = 0
    subspace: int | None = None
    tol: float | None = None
    grows_with_scaling = False

    def __post_init__(self) -> None:
        svd.check_options(self.method, self.tol, self.subspace)
        as_integer(self.seed, "seed")
        if self.tol is not None:
            check_tolerance(self.tol)

    @abstractmethod
    def _start(self, U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Start:
        """From the r largest triplets of a weight."""

    def starts(
        self,
        weights: Sequence[Tensor],
        r: int,
        scaling: float = 1.0,
        gradients: Sequence[Tensor] | None = None,
    ) -> list[Start]:
        """The starts of weights of one shape, dtype and device."""
        options = {"tol": self.tol, "subspace": self.subspace, "seed": self.seed}
        U, S, Vh, _ = svd.truncated(list(weights), r, self.method, **options)
        for name, weight, values in zip(names(weights), weights, S, strict=True):
            refuse_small_rank(values, weight, name, type(self).__name__)
        return [self._start(*triplets, scaling) for triplets in zip(U, S, Vh, strict=True)]


@dataclass(frozen=True)
class PiSSA(_Leading):
    """B = U_r √(S_r / s), A = √(S_r / s) V_rᵀ of the r largest singular triplets of W = USVᵀ.

    Meng et al., arXiv 2404.02948, equations 2 and 3; s·BA is the best approximation of W of rank r.
    W changes (W − s·BA). Cost: some ten products of W with r columns; with `method="exact"` a full
    SVD, 12 to 40 s for 4096 × 4096 on 2 cores. There is no recipe: the factors are kept.

    `method`, `seed`, `subspace` and `tol` are those of `lora_kernels.svd.truncated`.
    """

    changes_base = True

    def _start(self, U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Start:
        return split(U, S, Vh, scaling)


@dataclass(frozen=True)
class MiLoRA(_Spectral):
    """PiSSA's formula on the r smallest singular triplets, the largest of them first.

    Wang et al., arXiv 2406.09044, section 3. W changes, as little as it can at this rank
    (W − s·BA). Cost: a factorisation of W (square) or of WᵀW (not square) in float64 and some
    solves; with `method="exact"` a full SVD. There is no recipe: the factors are kept.

    A singular value that is zero but for rounding gives small factors, which train; one that is
    zero gives none, which never would, and is an error.

    `method` and `seed` are those of `lora_kernels.svd.minor`.
    """

    method: str = "randomized"
    seed: int = 0
    changes_base = True
    grows_with_scaling = False

    def __post_init__(self) -> None:
        svd.check_options(self.method)
        as_integer(self.seed, "seed")

    def starts(
        self,
        weights: Sequence[Tensor],
        r: int,
        scaling: float = 1.0,
        gradients: Sequence[Tensor] | None = None,
    ) -> list[Start]:
        """The starts of weights of one shape, dtype and device; ValueError if one holds NaN or Inf,
        or if one of its r smallest singular values is zero (less than 1e-12 of its largest entry).
        """
        largest = [float(torch.linalg.vector_norm(weight, math.inf)) for weight in weights]
        for name, value in zip(names(weights), largest, strict=True):
            if value == 0:
                raise ValueError(
                    f"{name} is zero: MiLoRA would start A and B at zero and never train"
                )
        U, S, Vh, _ = svd.minor(list(weights), r, self.method, seed=self.seed)
        for name, values, value in zip(names(weights), S, largest, strict=True):
            zeros = int(torch.le(values, _ZERO * value).sum())
            if zeros:
                raise ValueError(
                    f"{zeros} of the {r} smallest singular values of {name}, of numerical rank "
                    f"{'at most ' * (zeros == r)}{min(weights[0].shape) - zeros}, are zero: these "
                    "components of MiLoRA would start at zero and never train; take another start"
                )
        return [
            split(u.flip(1), s.flip(0), vh.flip(0), scaling)
            for u, s, vh in zip(U, S, Vh, strict=True)
        ]


@dataclass(frozen=True)
class OLoRA(_Spectral):
    """B = Q[:, :r], A = R[:r] of W = QR, with the signs that make R's diagonal positive.

    Büyükakyüz, arXiv 2406.01775. Deterministic; not divided by s. W changes
    (W − s·BA). Cost: a QR of W's first r columns and one product of W with r columns. There is no
    recipe: the factors are kept.

    B is orthonormal whatever W is, so that every component trains, those that start at zero too
    (W of a rank less than r, or zero).
    """

    changes_base = True

    def starts(
        self,
        weights: Sequence[Tensor],
        r: int,
        scaling: float = 1.0,
        gradients: Sequence[Tensor] | None = None,
    ) -> list[Start]:
        """The starts of weights of one shape, dtype and device; ValueError if one holds NaN or
        Inf.
        """
        Q, R = torch.ops.lora.thin_qr_foreach(list(weights), r)
        return [Start(right, left) for left, right in zip(Q, R, strict=True)]


@dataclass(frozen=True)
class LoRAXS(_Leading):
    """B = U_r, A = S_r V_rᵀ of W = USVᵀ, both frozen; only R ~ N(0, `sigma`²) [r, r] trains.

    Bałazy et al., arXiv 2405.17604, section 3: y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ. The paper's s is 1:
    `lora_alpha` = r. W does not change: s·B R A is some 1e-5 of W. Cost: that of PiSSA. There is no
    recipe: A and B are kept.

    `method`, `subspace` and `tol` are those of `lora_kernels.svd.truncated`; `seed` is its seed and
    that of R's own generator.
    """

    sigma: float = 1e-5
    changes_base = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.sigma, "sigma")

    def _start(self, U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Start:
        r = len(S)
        lora_R = torch.empty(r, r, dtype=U.dtype, device=U.device)
        generator = torch.Generator(U.device).manual_seed(int(self.seed))
        return Start(S[:, None] * Vh, U, lora_R=lora_R.normal_(std=self.sigma, generator=generator))


def refuse_small_rank(S: Tensor, matrix: Tensor, name: str, method: str) -> None:
    """Raises if one of `matrix`'s singular values S, the largest first, is zero but for rounding:
    a few eps of the largest, which grow slowly with the size.
    """
    noise = 4 * math.sqrt(max(matrix.shape)) * torch.finfo(S.dtype).eps * float(S[0])
    r, rank = len(S), int(torch.gt(S, noise).sum())
    if rank == 0:
        raise ValueError(f"{name} is zero: {method} would start at zero and never train")
    if rank < r:
        raise ValueError(
            f"{name} has numerical rank {rank}, less than r = {r}: the other {r - rank} "
            f"components of {method} would start at zero and never train; take r <= {rank}"
        )


def split(U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Start:
    """A and B with s·BA = U S Vᵀ, half of S / s in each."""
    check_finite(scaling, "scaling")
    if scaling <= 0:
        raise ValueError(f"scaling must be positive, got {scaling}")
    root = (S / scaling).sqrt()
    return Start(root[:, None] * Vh, U * root)


register_initializer("pissa", PiSSA)
register_initializer("milora", MiLoRA)
register_initializer("olora", OLoRA)
register_initializer("lora_xs", LoRAXS)
