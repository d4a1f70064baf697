"""Starts from a factorization of the weight: PiSSA, MiLoRA, OLoRA, LoRA-XS.

All but LoRA-XS change W to W − s·BA. None has a recipe: the layer stores the initial factors, so
that its base can be restored and a saved layer reloaded exactly, although an SVD may give other
bits the next time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.checks import as_integer, check_positive
from ..ops import svd
from ..ops.svd._matrices import names
from ..ops.svd.randomized_svd import check_tolerance
from .base import Initializer, register_initializer
from .start import Start, StartRequest, batched

# A σ below this share of W's largest entry counts as zero: A and B are roots of σ, so they would be
# a millionth of their usual size and would not train.
_ZERO = 1e-12


class _Factorization(Initializer):
    """Starts that subclasses make in batches, because a GPU factorizes many weights at once."""

    reads_weight = True

    def make_start(self, request: StartRequest) -> Start:
        return self.make_starts([request])[0]


@dataclass(frozen=True)
class _LargestTriplets(_Factorization, ABC):
    """Starts from the r largest singular triplets. Options: those of `lora_kernels.svd.truncated`.

    ValueError if a weight holds NaN or Inf, or has a rank less than r: the components beyond its
    rank would be zero in A and in B, and never train.
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
        """From the r largest triplets of one weight: U [n, r], S [r], Vh [r, m]."""

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        weights, r, scaling = batched(requests)
        U, S, Vh, _ = svd.truncated(
            weights, r, self.method, tol=self.tol, subspace=self.subspace, seed=self.seed
        )
        for name, weight, values in zip(names(weights), weights, S, strict=True):
            refuse_small_rank(values, weight, name, type(self).__name__)
        return [self._start(*triplets, scaling) for triplets in zip(U, S, Vh, strict=True)]


@dataclass(frozen=True)
class PiSSA(_LargestTriplets):
    """B = U_r √(S_r / s), A = √(S_r / s) V_rᵀ of the r largest singular triplets of W = USVᵀ.

    Meng et al., arXiv 2404.02948, equations 2 and 3; s·BA is the best approximation of W of rank r.
    W changes (W − s·BA). Cost: some ten products of W with r columns; with `method="exact"` a full
    SVD, 12 to 40 s for 4096 × 4096 on 2 cores. No recipe: the layer stores the initial factors.

    `method`, `seed`, `subspace` and `tol` are those of `lora_kernels.svd.truncated`.
    """

    changes_base = True

    def _start(self, U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Start:
        return split(U, S, Vh, scaling)


@dataclass(frozen=True)
class MiLoRA(_Factorization):
    """PiSSA's formula for the r smallest singular triplets, in descending order.

    Wang et al., arXiv 2406.09044, section 3. W changes (W − s·BA), by its r smallest components.
    Cost: a factorization of W (square) or of WᵀW (not square) in float64 and some solves; with
    `method="exact"` a full SVD. No recipe: the layer stores the initial factors.

    A singular value that is zero up to rounding gives small factors, which train. ValueError if one
    is less than 1e-12 of W's largest entry, which would never train, or if W holds NaN or Inf.

    `method` and `seed` are those of `lora_kernels.svd.minor`.
    """

    method: str = "randomized"
    seed: int = 0
    changes_base = True
    grows_with_scaling = False

    def __post_init__(self) -> None:
        svd.check_options(self.method)
        as_integer(self.seed, "seed")

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        weights, r, scaling = batched(requests)
        largest = [float(torch.linalg.vector_norm(weight, math.inf)) for weight in weights]
        for name, value in zip(names(weights), largest, strict=True):
            if value == 0:
                raise ValueError(
                    f"{name} is zero: MiLoRA would start A and B at zero and never train"
                )
        U, S, Vh, _ = svd.minor(weights, r, self.method, seed=self.seed)
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
class OLoRA(_Factorization):
    """B = Q[:, :r], A = R[:r] of W = QR, with signs that make the diagonal of R positive.

    Büyükakyüz, arXiv 2406.01775. Deterministic; not divided by s. W changes (W − s·BA). Cost: a QR
    of W's first r columns and one product of W with r columns. No recipe: the layer stores the
    initial factors. ValueError if W holds NaN or Inf.

    B is orthonormal for every W. So every component trains, also where A starts at zero because W
    has a rank less than r.
    """

    changes_base = True

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        weights, r, _ = batched(requests)
        Q, R = torch.ops.lora.thin_qr_foreach(weights, r)  # [k, n, r], [k, r, m]
        return [Start(right, left) for left, right in zip(Q, R, strict=True)]


@dataclass(frozen=True)
class LoRAXS(_LargestTriplets):
    """B = U_r, A = S_r V_rᵀ of W = USVᵀ, both frozen; only R ~ N(0, `sigma`²) [r, r] trains.

    Bałazy et al., arXiv 2405.17604, section 3: y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ. The paper's s is 1:
    `lora_alpha` = r. W does not change: s·B R A is about 1e-5 of W. Cost: that of PiSSA. No recipe:
    the layer stores A and B.

    `method`, `subspace` and `tol` are those of `lora_kernels.svd.truncated`. `seed` seeds the SVD,
    and R's own generator.
    """

    sigma: float = 1e-5
    changes_base = False
    has_R = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.sigma, "sigma")

    def _start(self, U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Start:
        r = len(S)
        lora_R = torch.empty(r, r, dtype=U.dtype, device=U.device)
        generator = torch.Generator(U.device).manual_seed(int(self.seed))
        return Start(S[:, None] * Vh, U, lora_R=lora_R.normal_(std=self.sigma, generator=generator))


def refuse_small_rank(S: Tensor, matrix: Tensor, name: str, method: str) -> None:
    """Raise if one of `matrix`'s singular values S, in descending order, is zero up to rounding: a
    few eps of the largest one, growing with the root of the matrix's size.
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
    """A [r, m] and B [n, r] with s·BA = U S Vᵀ; each gets a factor √(S / s)."""
    check_positive(scaling, "scaling")
    root = (S / scaling).sqrt()
    return Start(root[:, None] * Vh, U * root)


register_initializer("pissa", PiSSA)
register_initializer("milora", MiLoRA)
register_initializer("olora", OLoRA)
register_initializer("lora_xs", LoRAXS)
