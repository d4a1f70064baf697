"""Rewrites the local part of a sharded weight: W − s·B₀A₀, or W + s·BA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..start import ROW_BLOCK, Start, subtract_factors_
from .layout import Block, Shards


def subtract_start_here_(weight: Shards, start: Start, scaling: float) -> None:
    """W ← W − scaling · B₀A₀ in place, for the parts that are here; a negative scaling restores W.

    `start` is that of the whole weight; for experts, a `Start.stacked`. The results equal those of
    `subtract_start_` on the whole bit for bit, except in float64 with a recipe, where sums may be
    rounded in another order.
    """
    if start.beta is not None:
        subtract_recipe_here_(weight, start.beta, start.lora_A.shape[-2], scaling)
    else:
        subtract_factors_here_(weight, *start.subtracted(), scaling)


def subtract_recipe_here_(weight: Shards, beta: Tensor, r: int, scaling: float) -> None:
    """W ← W − scaling · β²ΦₙΦₘᵀ in place; β is one number, or [E] for experts."""
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
    """W ← W − scaling · BA in place, with A [r, in] and B [out, r], or [E, r, in] and [E, out, r]
    for experts; summed in float32 or wider and rounded once.
    """
    for block in weight.blocks:
        if block.data.numel():
            own = block.matrix if lora_A.dim() == 3 else ...
            right, left = (factor[own].to(block.data.device) for factor in (lora_A, lora_B))
            _subtract_factors_in_(block, right, left, scaling)
    weight.settle()


def _subtract_factors_in_(block: Block, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Subtracts the part of scaling · BA that is in the block.

    The last bits of a matrix product depend on its shape. So each group of rows that
    `subtract_factors_` multiplies at a time is multiplied as a whole here too, with zeros for the
    entries that other processes hold.
    """
    rows, cols = block.data.shape
    end = block.row + rows
    begins, ends = block.row % ROW_BLOCK == 0, end % ROW_BLOCK == 0 or end == len(lora_B)
    if begins and ends and cols == lora_A.shape[1]:  # these rows are all here
        subtract_factors_(block.data, lora_A, lora_B[block.row : end], scaling)
        return
    work = torch.promote_types(block.data.dtype, torch.float32)
    columns = slice(block.col, block.col + cols)
    for begin in range(block.row // ROW_BLOCK * ROW_BLOCK, end, ROW_BLOCK):
        left = lora_B[begin : begin + ROW_BLOCK]
        first, last = max(begin, block.row), min(begin + len(left), end)
        own = block.data[first - block.row : last - block.row]
        place = slice(first - begin, last - begin), columns
        wide = torch.zeros(len(left), lora_A.shape[1], dtype=work, device=own.device)
        wide[place] = own.to(work)
        subtract_factors_(wide, lora_A, left, scaling)
        own.copy_(wide[place])
