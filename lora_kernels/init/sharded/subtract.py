"""Rewrites the local part of a sharded weight: W − s·B₀A₀, or W + s·BA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..start import Start, subtract_factors_
from .layout import Block, Shards


def subtract_start_here_(weight: Shards, start: Start, scaling: float) -> None:
    """W ← W − scaling · B₀A₀ in place, for the parts that are here; a negative scaling restores W.

    `start` is that of the whole weight: of experts, a `Start.stacked`. The results are the bits of
    `subtract_start_` on the whole, except in float64, where sums may be rounded in another order.
    """
    if start.beta is not None:
        subtract_recipe_here_(weight, start.beta, start.lora_A.shape[-2], scaling)
    else:
        subtract_factors_here_(weight, start.right(), start.lora_B, scaling)


def subtract_recipe_here_(weight: Shards, beta: Tensor, r: int, scaling: float) -> None:
    """W ← W − scaling · β²ΦₙΦₘᵀ in place, β one number, of experts [E]."""
    coefficients = (scaling * beta.to(weight.device, torch.float64) ** 2).reshape(-1)
    rows, cols = weight.shape[-2:]
    for block in weight.blocks:
        if block.data.numel():
            coefficient = coefficients[block.matrix]
            torch.ops.lora.subtract_dst_(
                block.data, coefficient, r, rows, cols, block.row, block.col
            )
    weight.settle()


def subtract_factors_here_(weight: Shards, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """W ← W − scaling · BA in place, with A [r, in] and B [out, r], of experts [E, r, in] and
    [E, out, r]; summed in float32 or wider and rounded once.
    """
    for block in weight.blocks:
        if block.data.numel():
            right, left = cut_factors(block, lora_A, lora_B)
            subtract_factors_(block.data, right, left, scaling)
    weight.settle()


def cut_factors(block: Block, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of A and the rows of B whose product is this block, on the block's device."""
    if lora_A.dim() == 3:
        lora_A, lora_B = lora_A[block.matrix], lora_B[block.matrix]
    rows, cols = block.data.shape
    device = block.data.device
    right = lora_A[:, block.col : block.col + cols].to(device)
    return right, lora_B[block.row : block.row + rows].to(device)
