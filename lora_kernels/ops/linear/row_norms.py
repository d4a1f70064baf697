"""`lora::row_norms`: ‖W + s·L·R‖ of every row, in one pass over W (DoRA, arXiv 2402.09353, eq. 5).

Shapes: weight W [N, K], right R [k, K], left L [N, k]; the result is [N], float32, or float64 if an
operand is. W + s·L·R is never in memory as a whole. Rows in which W and s·L·R nearly cancel are
computed in float64, so that the result is accurate to 1e-6 for the given operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._utils.checks import FLOATS, check_finite, check_weight
from .._backends.library import define_composite, define_kernel
from .factors import widest

_BLOCK_ENTRIES = 1 << 20


def row_norms_ref(weight: Tensor, right: Tensor, left: Tensor, scaling: float) -> Tensor:
    """In float64, by blocks of rows: slow but simple."""
    rows, cols = weight.shape
    norms = torch.empty(rows, dtype=torch.float64, device=weight.device)
    wide = right.to(torch.float64)  # [k, K]
    step = max(1, _BLOCK_ENTRIES // max(1, cols))
    for begin in range(0, rows, step):
        block = slice(begin, begin + step)
        scaled = left[block].to(torch.float64) * scaling  # [step, k]
        entries = weight[block].to(torch.float64).addmm(scaled, wide)  # [step, K]
        norms[block] = torch.linalg.vector_norm(entries, dim=1)
    return norms.to(widest(weight, right, left))


def row_norms_fake(weight: Tensor, right: Tensor, left: Tensor, scaling: float) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=widest(weight, right, left))


def row_norms(weight: Tensor, right: Tensor, left: Tensor, scaling: float) -> Tensor:
    _check(weight, right, left, scaling)
    with torch.no_grad():
        result: Tensor = torch.ops.lora._row_norms(weight, right, left, scaling)
        return result


def row_gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m ⊘ ‖V‖ [out] from DoRA's m and the norms of V's rows (arXiv 2402.09353, equation 5), in
    float32 or wider; 1 where a norm is 0. The gradient of m treats the norms as constants (section
    4.3).
    """
    zero = norms == 0
    ratio = magnitude.to(norms.dtype) / norms.masked_fill(zero, 1.0)
    return ratio.masked_fill(zero, 1.0)


def _check(weight: Tensor, right: Tensor, left: Tensor, scaling: float) -> None:
    check_finite(scaling, "scaling")
    check_weight(weight)
    n, m = weight.shape
    if right.dim() != 2 or right.shape[1] != m:
        raise ValueError(
            f"right must be [k, {m}] to fit weight [{n}, {m}], got {list(right.shape)}"
        )
    k = right.shape[0]
    if left.shape != (n, k):
        raise ValueError(
            f"left must be [{n}, {k}] to fit weight [{n}, {m}] and right [{k}, {m}], "
            f"got {list(left.shape)}"
        )
    for name, operand in (("right", right), ("left", left)):
        if operand.device != weight.device:
            raise ValueError(f"{name} is on {operand.device}, weight on {weight.device}")
        if operand.dtype not in FLOATS:
            raise TypeError(f"{name} must be a real float, got {operand.dtype}")


define_kernel(
    "_row_norms(Tensor weight, Tensor right, Tensor left, float scaling) -> Tensor",
    row_norms_ref,
    row_norms_fake,
)
define_composite(
    "row_norms(Tensor weight, Tensor right, Tensor left, float scaling) -> Tensor", row_norms
)
