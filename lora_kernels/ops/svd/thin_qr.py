"""`lora::thin_qr` and `lora::thin_qr_foreach`: the first columns of Q and the first rows of R of a
weight's QR, from which OLoRA starts (arXiv 2406.01775). The rest is not computed.
"""

from __future__ import annotations

import torch

from ..._utils.checks import factor_dtype
from .._backends.library import define_composite, define_constant_kernel, define_kernel
from ._matrices import check_matrices, refuse_not_finite, stacked


def leading_qr(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Q [n, rank] from the QR of W[:, :rank], and R [rank, m] = QᵀW, whose first columns are the
    triangle of that QR. The diagonal of R is not negative.
    """
    wide = weight.to(factor_dtype(weight.dtype))
    Q, triangle = torch.linalg.qr(wide[:, :rank])
    sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
    Q = Q * sign
    return Q, torch.cat([triangle * sign[:, None], Q.T @ wide[:, rank:]], dim=1)


def thin_qr_ref(weights: list[torch.Tensor], rank: int) -> tuple[torch.Tensor, ...]:
    return stacked([leading_qr(weight, rank) for weight in weights])


def thin_qr_fake(weights: list[torch.Tensor], rank: int) -> tuple[torch.Tensor, ...]:
    (rows, cols), k = weights[0].shape, len(weights)
    dtype = factor_dtype(weights[0].dtype)
    Q = weights[0].new_empty((k, rows, rank), dtype=dtype)
    return Q, weights[0].new_empty((k, rank, cols), dtype=dtype)


def thin_qr_foreach(weights: list[torch.Tensor], rank: int) -> tuple[torch.Tensor, ...]:
    check_matrices(weights, rank)
    refuse_not_finite(weights)
    return torch.ops.lora._thin_qr(weights, rank)


def thin_qr_foreach_fake(weights: list[torch.Tensor], rank: int) -> tuple[torch.Tensor, ...]:
    check_matrices(weights, rank)
    return thin_qr_fake(weights, rank)


def thin_qr(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    Q, R = torch.ops.lora.thin_qr_foreach([weight], rank)
    return Q[0], R[0]


define_kernel(
    "_thin_qr(Tensor[] weights, SymInt rank) -> (Tensor Q, Tensor R)", thin_qr_ref, thin_qr_fake
)
define_constant_kernel(
    "thin_qr_foreach(Tensor[] weights, SymInt rank) -> (Tensor Q, Tensor R)",
    thin_qr_foreach,
    thin_qr_foreach_fake,
)
define_composite("thin_qr(Tensor weight, SymInt rank) -> (Tensor Q, Tensor R)", thin_qr)
