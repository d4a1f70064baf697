"""`lora::_dst_basis_` on a GPU: a table of the 2(size + 1) values, then one gather per entry.

Bytes: the output once. The table (88 KB for size 11008) stays in the L1 and L2 caches.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .sine import sin_pi

TABLE_BLOCK = 256
ROWS, COLS = 32, 128  # a tile of the gather: whole 128-byte lines of the output


@triton.jit
def dst_table_kernel(table, scale, norm, n, HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """table[p] = norm * sin(π p / n) * scale, rounded once, for p in [0, 2n)."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    value = tl.load(norm) * sin_pi(p.to(tl.int64), n)
    if HAS_SCALE:
        value = value * tl.load(scale)
    tl.store(table + p, value.to(table.dtype.element_ty), mask=p < 2 * n)


@triton.jit
def dst_gather_kernel(
    out,
    table,
    rows,
    cols,
    row_stride,
    col_stride,
    first_row,
    first_col,
    period,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[i, j] = table[(first_row + i + 1)(first_col + j + 1) mod period]."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    j = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)[None, :]  # [1, COLS]
    mask = (i < rows) & (j < cols)
    index = ((first_row + i + 1) * (first_col + j + 1)) % period
    value = tl.load(table + index, mask=mask)
    tl.store(out + i * row_stride + j * col_stride, value, mask=mask)


def sine_table(
    size: int, dtype: torch.dtype, device: torch.device, scale: torch.Tensor | None
) -> torch.Tensor:
    """[2 (size + 1)]: the distinct values of the basis of `size`, with their signs."""
    n = size + 1
    table = torch.empty(2 * n, dtype=dtype, device=device)
    # The norm goes in as a tensor: a Python float would reach the kernel as float32.
    norm = torch.full((), math.sqrt(2.0 / n), dtype=torch.float64, device=device)
    dst_table_kernel[(triton.cdiv(2 * n, TABLE_BLOCK),)](
        table,
        norm if scale is None else scale.to(torch.float64),
        norm,
        n,
        HAS_SCALE=scale is not None,
        BLOCK=TABLE_BLOCK,
        enable_fp_fusion=False,
    )
    return table


def dst_basis_(
    out: torch.Tensor, size: int, offset: int, scale: torch.Tensor | None = None
) -> None:
    """Writes rows [offset, offset + len(out)) of the basis of `size` into `out`, of any strides."""
    if out.numel() == 0:
        return
    table = sine_table(size, out.dtype, out.device, scale)
    first_row, first_col = offset, 0
    if out.stride(0) < out.stride(1):  # an entry is symmetric in i + 1 and j + 1
        out, first_row, first_col = out.T, 0, offset
    rows, cols = out.shape
    dst_gather_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(cols, COLS))](
        out,
        table,
        rows,
        cols,
        out.stride(0),
        out.stride(1),
        first_row,
        first_col,
        2 * (size + 1),
        ROWS=ROWS,
        COLS=COLS,
    )
