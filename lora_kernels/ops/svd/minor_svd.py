"""`lora::minor_svd` and `lora::minor_svd_foreach`: the smallest singular triplets, from which
MiLoRA starts (arXiv 2406.09044, section 3). Compiled kernels find them by inverse iteration.
"""

from __future__ import annotations

import torch

from .._backends.library import define_composite, define_constant_kernel, define_kernel
from ._matrices import check_matrices, empty_svd, exact_svd, refuse_not_finite, stacked


def minor_triplets(
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor], rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The last `rank` triplets of a thin SVD in reverse order: σ ascending."""
    U, S, Vh = factors
    last = slice(len(S) - rank, None)
    return U[:, last].flip(1), S[last].flip(0), Vh[last].flip(0)


def minor_svd_ref(weights: list[torch.Tensor], rank: int, seed: int) -> tuple[torch.Tensor, ...]:
    """From the exact SVD, one weight after the other; the seed has no effect."""
    return stacked([minor_triplets(exact_svd(weight), rank) for weight in weights])


def minor_svd_fake(weights: list[torch.Tensor], rank: int, seed: int) -> tuple[torch.Tensor, ...]:
    return empty_svd(weights, rank)


def minor_svd_foreach(
    weights: list[torch.Tensor], rank: int, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    check_matrices(weights, rank)
    refuse_not_finite(weights)
    return torch.ops.lora._minor_svd(weights, rank, seed)


def minor_svd_foreach_fake(
    weights: list[torch.Tensor], rank: int, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    check_matrices(weights, rank)
    return minor_svd_fake(weights, rank, seed)


def minor_svd(
    weight: torch.Tensor, rank: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.ops.lora.minor_svd_foreach([weight], rank, seed)
    return U[0], S[0], Vh[0]


define_kernel(
    "_minor_svd(Tensor[] weights, SymInt rank, int seed) -> (Tensor U, Tensor S, Tensor Vh)",
    minor_svd_ref,
    minor_svd_fake,
)
define_constant_kernel(
    "minor_svd_foreach(Tensor[] weights, SymInt rank, int seed=0) "
    "-> (Tensor U, Tensor S, Tensor Vh)",
    minor_svd_foreach,
    minor_svd_foreach_fake,
)
define_composite(
    "minor_svd(Tensor weight, SymInt rank, int seed=0) -> (Tensor U, Tensor S, Tensor Vh)",
    minor_svd,
)
