"""`lora::randomized_svd` and `lora::randomized_svd_foreach`: the largest singular triplets.
Compiled kernels find them by block Krylov iteration (Musco and Musco, arXiv 1504.05477, alg. 2).
"""

from __future__ import annotations

import torch

from ..._utils.checks import check_finite
from .._backends.library import define_composite, define_constant_kernel, define_kernel
from ._matrices import check_matrices, empty_svd, exact_svd, refuse_not_finite, stacked


def check_subspace(subspace: int | None, rank: int, rows: int, cols: int) -> None:
    """Raise unless `subspace` is None or lies between the rank and min(rows, cols)."""
    if subspace is not None and not rank <= subspace <= min(rows, cols):
        raise ValueError(
            f"subspace must be in [rank, min(n, m)] = [{rank}, {min(rows, cols)}], got {subspace}"
        )


def check_tolerance(tol: float) -> None:
    """Raise unless `tol` is finite and not negative."""
    check_finite(tol, "tol")
    if tol < 0:
        raise ValueError(f"tol must not be negative, got {tol}")


def randomized_svd_ref(
    weights: list[torch.Tensor], rank: int, subspace: int, seed: int, tol: float
) -> tuple[torch.Tensor, ...]:
    """From the exact SVD, one weight after the other; the seed has no effect. The error is 0,
    because nothing is iterated, or NaN if `tol` is 0.
    """
    factors = [(U[:, :rank], S[:rank], Vh[:rank]) for U, S, Vh in map(exact_svd, weights)]
    error = torch.full((len(weights),), 0.0 if tol > 0 else torch.nan, dtype=torch.float64)
    return *stacked(factors), error.to(weights[0].device)


def randomized_svd_fake(
    weights: list[torch.Tensor], rank: int, subspace: int, seed: int, tol: float
) -> tuple[torch.Tensor, ...]:
    error = weights[0].new_empty(len(weights), dtype=torch.float64)
    return *empty_svd(weights, rank), error


def _check(weights: list[torch.Tensor], rank: int, subspace: int | None, tol: float) -> None:
    check_matrices(weights, rank)
    check_subspace(subspace, rank, *weights[0].shape)
    check_tolerance(tol)


def randomized_svd_foreach(
    weights: list[torch.Tensor],
    rank: int,
    subspace: int | None = None,
    seed: int = 0,
    tol: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    _check(weights, rank, subspace, tol)
    refuse_not_finite(weights)
    return torch.ops.lora._randomized_svd(weights, rank, subspace or 0, seed, tol)


def randomized_svd_foreach_fake(
    weights: list[torch.Tensor],
    rank: int,
    subspace: int | None = None,
    seed: int = 0,
    tol: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    _check(weights, rank, subspace, tol)
    return randomized_svd_fake(weights, rank, subspace or 0, seed, tol)


def randomized_svd(
    weight: torch.Tensor, rank: int, subspace: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    U, S, Vh, _ = torch.ops.lora.randomized_svd_foreach([weight], rank, subspace, seed)
    return U[0], S[0], Vh[0]


define_kernel(
    "_randomized_svd(Tensor[] weights, SymInt rank, SymInt subspace, int seed, float tol) "
    "-> (Tensor U, Tensor S, Tensor Vh, Tensor error)",
    randomized_svd_ref,
    randomized_svd_fake,
)
define_constant_kernel(
    "randomized_svd_foreach(Tensor[] weights, SymInt rank, SymInt? subspace=None, int seed=0, "
    "float tol=0.0) -> (Tensor U, Tensor S, Tensor Vh, Tensor error)",
    randomized_svd_foreach,
    randomized_svd_foreach_fake,
)
define_composite(
    "randomized_svd(Tensor weight, SymInt rank, SymInt? subspace=None, int seed=0) "
    "-> (Tensor U, Tensor S, Tensor Vh)",
    randomized_svd,
)
