"""`lora::frobenius_stats`: sum and sum of squares of many weights in one call."""

from __future__ import annotations

import torch

from .._utils.checks import check_same_device, check_weight
from ._backends.library import define_composite, define_kernel


def frobenius_stats_ref(weights: list[torch.Tensor]) -> torch.Tensor:
    """[len(weights), 2] float64. One weight at a time, so that at most one float64 copy exists."""
    rows = []
    for weight in weights:
        wide = weight.to(torch.float64)
        rows.append(torch.stack([wide.sum(), wide.square().sum()]))
    return torch.stack(rows) if rows else torch.empty(0, 2, dtype=torch.float64)


def frobenius_stats_fake(weights: list[torch.Tensor]) -> torch.Tensor:
    device = weights[0].device if weights else torch.device("cpu")
    return torch.empty(len(weights), 2, dtype=torch.float64, device=device)


def frobenius_stats(weights: list[torch.Tensor]) -> torch.Tensor:
    for k, weight in enumerate(weights):
        check_weight(weight, f"weights[{k}]")
    check_same_device(weights)
    if not weights:
        return torch.empty(0, 2, dtype=torch.float64)
    return torch.ops.lora._frobenius_stats(weights)


define_kernel(
    "_frobenius_stats(Tensor[] weights) -> Tensor", frobenius_stats_ref, frobenius_stats_fake
)
define_composite("frobenius_stats(Tensor[] weights) -> Tensor", frobenius_stats)
