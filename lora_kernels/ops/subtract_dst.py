"""`lora::subtract_dst_`: W −= c · Φₙ Φₘᵀ in place (LoRAM, arXiv 2507.06558, algorithm 1).
`lora::subtract_dst_foreach_` does this for many weights, such as those of experts, in one call.
"""

from __future__ import annotations

from functools import partial

import torch

from .._utils.checks import (
    check_rank,
    check_same_device,
    check_size,
    check_weight,
    check_writable,
)
from ._backends.library import define_composite, define_mutating_kernel
from .dst_basis import dst_basis

_ROW_BLOCK = 256


def subtract_dst_ref(
    weight: torch.Tensor,
    coefficient: torch.Tensor,
    rank: int,
    global_rows: int,
    global_cols: int,
    row_offset: int,
    col_offset: int,
) -> None:
    """The product itself, in float64 and by blocks of rows: slow but simple."""
    rows, cols = weight.shape
    basis = partial(dst_basis, rank=rank, dtype=torch.float64, device=weight.device)
    right = basis(global_cols, offset=col_offset, length=cols)  # [cols, rank]
    for begin in range(0, rows, _ROW_BLOCK):
        block = weight[begin : begin + _ROW_BLOCK]  # [block, cols]
        left = basis(global_rows, offset=row_offset + begin, length=len(block))  # [block, rank]
        product = (coefficient * left) @ right.T
        block.copy_(block.to(product.dtype) - product)


def subtract_dst_(
    weight: torch.Tensor,
    coefficient: torch.Tensor,
    rank: int,
    global_rows: int | None = None,
    global_cols: int | None = None,
    row_offset: int = 0,
    col_offset: int = 0,
) -> torch.Tensor:
    check_weight(weight)
    check_writable(weight)
    rows, cols = weight.shape
    global_rows = rows if global_rows is None else global_rows
    global_cols = cols if global_cols is None else global_cols
    check_size(global_rows, "global_rows")
    check_size(global_cols, "global_cols")
    check_rank(rank, global_rows, global_cols)
    torch._check_value(
        coefficient.numel() == 1 and coefficient.is_floating_point(),
        lambda: "coefficient must hold exactly one floating-point number",
    )
    torch._check_value(
        coefficient.device == weight.device,
        lambda: f"coefficient is on {coefficient.device}, weight on {weight.device}",
    )
    for axis, offset, size, whole in (
        ("rows", row_offset, rows, global_rows),
        ("columns", col_offset, cols, global_cols),
    ):
        torch._check_value(
            offset >= 0 and offset + size <= whole,
            lambda axis=axis, offset=offset, size=size, whole=whole: (
                f"{axis} [{offset}, {offset + size}) do not lie in the global [0, {whole})"
            ),
        )
    with torch.no_grad():
        torch.ops.lora._subtract_dst_(
            weight, coefficient, rank, global_rows, global_cols, row_offset, col_offset
        )
    return weight


def subtract_dst_foreach_ref(
    weights: list[torch.Tensor], coefficients: torch.Tensor, rank: int
) -> None:
    """One weight after another."""
    for weight, coefficient in zip(weights, coefficients, strict=True):
        torch.ops.lora._subtract_dst_(weight, coefficient, rank, *weight.shape, 0, 0)


def subtract_dst_foreach_(
    weights: list[torch.Tensor], coefficients: torch.Tensor, rank: int
) -> None:
    check_same_device(weights)
    for k, weight in enumerate(weights):
        check_weight(weight, f"weights[{k}]")
        check_writable(weight, f"weights[{k}]")
        check_rank(rank, weight.shape[0], weight.shape[1])
    if coefficients.shape != (len(weights),) or not coefficients.is_floating_point():
        raise ValueError(
            f"coefficients must be one floating-point number for each of {len(weights)} weights, "
            f"got {coefficients.dtype} {list(coefficients.shape)}"
        )
    if weights and coefficients.device != weights[0].device:
        raise ValueError(
            f"coefficients are on {coefficients.device}, weights on {weights[0].device}"
        )
    with torch.no_grad():
        torch.ops.lora._subtract_dst_foreach_(weights, coefficients, rank)


define_mutating_kernel(
    "_subtract_dst_(Tensor(a!) weight, Tensor coefficient, SymInt rank, SymInt global_rows, "
    "SymInt global_cols, SymInt row_offset, SymInt col_offset) -> ()",
    subtract_dst_ref,
    lambda weight, *rest: [weight],
)
define_composite(
    "subtract_dst_(Tensor(a!) weight, Tensor coefficient, SymInt rank, SymInt? global_rows=None, "
    "SymInt? global_cols=None, SymInt row_offset=0, SymInt col_offset=0) -> Tensor(a!)",
    subtract_dst_,
)
define_mutating_kernel(
    "_subtract_dst_foreach_(Tensor(a!)[] weights, Tensor coefficients, SymInt rank) -> ()",
    subtract_dst_foreach_ref,
    lambda weights, *rest: list(weights),
)
define_composite(
    "subtract_dst_foreach_(Tensor(a!)[] weights, Tensor coefficients, SymInt rank) -> ()",
    subtract_dst_foreach_,
)
