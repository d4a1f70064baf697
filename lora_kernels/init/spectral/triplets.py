"""What the starts from singular triplets share: batches, options, and checks of the values."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils.checks import as_integer, check_positive
from ...ops import svd
from ...ops.svd._matrices import names
from ...ops.svd.randomized_svd import check_tolerance
from ..base import Initializer
from ..start import Start, StartRequest, batched

# A σ below this share of W's largest entry is treated as zero: A and B are roots of σ, so they
# would be a millionth of their usual size and would not train.
_ZERO = 1e-12


class Factorization(Initializer):
    """Starts computed in batches by subclasses, because a GPU factorizes many weights at once."""

    reads_weight = True

    def make_start(self, request: StartRequest) -> Start:
        return self.make_starts([request])[0]


@dataclass(frozen=True)
class LargestTriplets(Factorization, ABC):
    """Starts from the r largest singular triplets. Options: those of `lora_kernels.svd.truncated`.

    ValueError if a weight holds NaN or Inf, or has a rank less than r: components beyond that rank
    would be zero in both A and B and would never train.
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


def smallest_triplets(
    weights: Sequence[Tensor], r: int, method: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """U [k, n, r], S [k, r] and Vh [k, r, m] of the r smallest triplets of each weight, σ
    descending: the last r columns of a full SVD.
    """
    U, S, Vh, _ = svd.minor(weights, r, method, seed=seed)
    return U.flip(2), S.flip(1), Vh.flip(1)


def refuse_zero_weights(weights: Sequence[Tensor], method: str) -> list[float]:
    """The largest magnitude of each weight's entries; raise if it is zero."""
    largest = [float(torch.linalg.vector_norm(weight, math.inf)) for weight in weights]
    for name, value in zip(names(list(weights)), largest, strict=True):
        if value == 0:
            raise ValueError(
                f"{name} is zero: {method} would start A and B at zero and never train"
            )
    return largest


def refuse_zero_values(
    S: Tensor, weights: Sequence[Tensor], largest: Sequence[float], method: str
) -> None:
    """Raise if one of the smallest singular values S [k, r] of the k weights, whose entries are at
    most `largest`, is zero.
    """
    for name, values, value in zip(names(list(weights)), S, largest, strict=True):
        r, zeros = len(values), int(torch.le(values, _ZERO * value).sum())
        if zeros:
            raise ValueError(
                f"{zeros} of the {r} smallest singular values of {name}, of numerical rank "
                f"{'at most ' * (zeros == r)}{min(weights[0].shape) - zeros}, are zero: these "
                f"components of {method} would start at zero and never train; take another start"
            )


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


def refuse_missing_rank(rows: Tensor, request: StartRequest, name: str, method: str) -> None:
    """`refuse_small_rank` for the products `rows` [r, m] of a matrix of the request's dtype with
    orthonormal vectors. For starts from a weighted matrix, whose values may be small for other
    reasons too.
    """
    norms = torch.linalg.vector_norm(rows, dim=1).sort(descending=True).values
    refuse_small_rank(norms.to(request.factor_dtype), request.weight, name, method)


def split(U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Start:
    """A [r, m] and B [n, r] with s·BA = U S Vᵀ; each gets a factor √(S / s)."""
    check_positive(scaling, "scaling")
    root = (S / scaling).sqrt()
    return Start(root[:, None] * Vh, U * root)
