"""Sums over the rows of each expert, without atomic operations: the gradients of A, B and the bias,
and of rows of x that occur several times.

The rows of an expert are divided into chunks; one program sums up each chunk. An expert with a
single chunk is then done. For the others, `grouped_reduce_kernel` adds the chunks in order. An
expert without rows gets zeros.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from ..integers import cdiv
from ..jobs import aligned
from ..launcher import Launch
from ..linear.rank import load_z, rank_block, rank_unit
from ..philox import drop, mask_arguments
from .schedule import Schedule, load_tile

CHUNK = 1024  # rows; for an expert with more, the parts have r / CHUNK of its rows' entries
BLOCK_C = 128
REDUCE_BLOCK = 512
GATHER_BLOCK = 1024


@triton.jit
def _store_part(out, parts, firsts, expert, chunk, r, C, where, value, mask):
    """Store a chunk's part, or the result if the expert has no other chunk."""
    if tl.load(firsts + expert + 1) - tl.load(firsts + expert) == 1:
        own = out + expert.to(tl.int64) * r * C + where
        tl.store(own, value.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(parts + chunk.to(tl.int64) * r * C + where, value, mask=mask)


@triton.jit(do_not_specialize=["E", "threshold"])
def grouped_outer_kernel(
    thin,
    wide,
    rows,
    out,
    parts,
    seed,
    tiles,
    firsts,
    E,
    C,
    r,
    wide_stride,
    out_rank,
    out_col,
    scale,
    threshold,
    keep_scale,
    HAS_ROWS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_UNIT: tl.constexpr,
):
    """A block of ranks × columns of a chunk's scale · thinᵀ drop(wide[rows])."""
    r = aligned(r, RANK_UNIT)
    chunk = tl.program_id(1)
    if chunk >= tl.load(firsts + E):
        return
    expert, begin, end = load_tile(tiles, chunk)
    begin_col = tl.program_id(0) * BLOCK_C
    col = begin_col + tl.arange(0, BLOCK_C)
    rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if HAS_DROPOUT:
        seed_value = tl.load(seed)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for m in range(begin, end, BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        row64 = row.to(tl.int64)
        inside = row < end
        source = tl.load(rows + row64, mask=inside, other=0) if HAS_ROWS else row64
        mask = inside[:, None] & (col < C)[None, :]
        value = tl.load(wide + source[:, None] * wide_stride + col[None, :], mask=mask, other=0.0)
        if HAS_DROPOUT:
            value = drop(value, seed_value, row64, begin_col, threshold, keep_scale, BLOCK_C)
        left = load_z(thin, row64, rank, end, r)
        acc = tl.dot(tl.trans(left), value, acc, input_precision="ieee")  # [BLOCK_R, BLOCK_C]
    where = rank[:, None] * out_rank + col[None, :] * out_col
    mask = (rank < r)[:, None] & (col < C)[None, :]
    _store_part(out, parts, firsts, expert, chunk, r, C, where, scale * acc, mask)


@triton.jit(do_not_specialize=["E"])
def grouped_sums_kernel(
    wide, out, parts, tiles, firsts, E, C, wide_stride, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """A block of columns of the sum of a chunk's rows."""
    chunk = tl.program_id(1)
    if chunk >= tl.load(firsts + E):
        return
    expert, begin, end = load_tile(tiles, chunk)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for m in range(begin, end, BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        mask = (row < end)[:, None] & (col < C)[None, :]
        where = row.to(tl.int64)[:, None] * wide_stride + col[None, :]
        acc += tl.load(wide + where, mask=mask, other=0.0).to(tl.float32)
    _store_part(out, parts, firsts, expert, chunk, 1, C, col, tl.sum(acc, 0), col < C)


@triton.jit(do_not_specialize=["length"])
def grouped_reduce_kernel(parts, out, firsts, length, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """The sum of each expert's parts, in order; zeros for none; a single part is already stored."""
    length = aligned(length, UNIT)
    expert = tl.program_id(1)
    first, end = tl.load(firsts + expert), tl.load(firsts + expert + 1)
    if end - first == 1:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < length
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(first, end, loop_unroll_factor=4):
        total += tl.load(parts + part * length.to(tl.int64) + at, mask=mask, other=0.0)
    where = out + expert * length.to(tl.int64) + at
    tl.store(where, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gather_sum_kernel(values, order, starts, out, C, BLOCK: tl.constexpr):
    """out[t] = the sum of values[order[j]] over j in [starts[t], starts[t + 1]), in order."""
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < C
    total = tl.zeros([BLOCK], tl.float32)
    for j in tl.range(tl.load(starts + t), tl.load(starts + t + 1), loop_unroll_factor=4):
        total += tl.load(values + tl.load(order + j) * C + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + t * C + col, total.to(out.dtype.element_ty), mask=mask)


def outer(
    thin: torch.Tensor,
    wide: torch.Tensor,
    rows: torch.Tensor | None,
    chunks: Schedule,
    out: torch.Tensor,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """out = scale · thinᵀ drop(wide[rows]) for each expert's rows. Returns `out`.

    thin [size, r] is contiguous, and so are the rows of wide [.., C]. `out`, which is written, is
    [E, r, C] and contiguous, or such a view of a contiguous [E, C, r].
    """
    E, r, C = out.shape
    launch = _plan_outer(
        (E, C, r, wide.stride(0), out.stride(1), out.stride(2)),
        chunks.limit,
        wide.element_size() == 4,
        rows is not None,
        dropout > 0,
    )
    parts = torch.empty((chunks.limit, r, C), dtype=torch.float32, device=out.device)
    launch(
        (
            thin,
            wide,
            thin if rows is None else rows,
            out,
            parts,
            thin if seed is None else seed,
            chunks.tiles,
            chunks.firsts,
        ),
        (scale, *mask_arguments(dropout)),
    )
    return _reduce(parts, out, chunks)


@functools.lru_cache(maxsize=1024)
def _plan_outer(
    sizes: tuple[int, ...], limit: int, wide: bool, has_rows: bool, has_dropout: bool
) -> Launch:
    _, C, r, *_ = sizes
    block_r = rank_block(r, 32 if wide else 128)
    # float32 is computed without tensor cores. The mask needs registers, and so do 128 ranks.
    few = has_dropout or block_r > 64
    return Launch(
        grouped_outer_kernel,
        (cdiv(C, BLOCK_C), limit, cdiv(r, block_r)),
        sizes,
        HAS_ROWS=has_rows,
        HAS_DROPOUT=has_dropout,
        BLOCK_M=16 if wide else 32 if few else 64,
        BLOCK_C=BLOCK_C,
        BLOCK_R=block_r,
        RANK_UNIT=rank_unit(r),
        num_warps=8 if block_r > 64 and has_dropout else 4,
        num_stages=3,
        enable_fp_fusion=True,
    )


def sums(wide: torch.Tensor, chunks: Schedule, out: torch.Tensor) -> torch.Tensor:
    """out [E, C] = the sum of each expert's rows of wide [size, C], whose rows are contiguous."""
    E, C = out.shape
    parts = torch.empty((chunks.limit, C), dtype=torch.float32, device=out.device)
    launch = _plan_sums((E, C, wide.stride(0)), chunks.limit)
    launch((wide, out, parts, chunks.tiles, chunks.firsts))
    return _reduce(parts, out, chunks)


@functools.lru_cache(maxsize=1024)
def _plan_sums(sizes: tuple[int, int, int], limit: int) -> Launch:
    grid = (cdiv(sizes[1], BLOCK_C), limit)
    return Launch(
        grouped_sums_kernel, grid, sizes, BLOCK_M=32, BLOCK_C=BLOCK_C, enable_fp_fusion=True
    )


def _reduce(parts: torch.Tensor, out: torch.Tensor, chunks: Schedule) -> torch.Tensor:
    _plan_reduce(out.shape[0], out[0].numel())((parts, out, chunks.firsts))
    return out


@functools.lru_cache(maxsize=1024)
def _plan_reduce(E: int, length: int) -> Launch:
    return Launch(
        grouped_reduce_kernel,
        (cdiv(length, REDUCE_BLOCK), E),
        (length,),
        BLOCK=REDUCE_BLOCK,
        UNIT=math.gcd(length, 4),
        enable_fp_fusion=True,
    )


def scatter(values: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """out [size, C] in the dtype of values [S, C]: out[t] is the sum of the values[i] with
    rows[i] = t, added in float32 in ascending order of i.
    """
    C = values.shape[1]
    small = rows.to(torch.int32)  # a radix sort then needs half as many passes
    ascending, order = torch.sort(small, stable=True)
    bounds = torch.arange(size + 1, dtype=torch.int32, device=rows.device)
    starts = torch.searchsorted(ascending, bounds)
    out = torch.empty((size, C), dtype=values.dtype, device=values.device)
    _plan_scatter(size, C)((values, order, starts, out))
    return out


@functools.lru_cache(maxsize=1024)
def _plan_scatter(size: int, C: int) -> Launch:
    grid = (size, cdiv(C, GATHER_BLOCK))
    return Launch(gather_sum_kernel, grid, (C,), BLOCK=GATHER_BLOCK, enable_fp_fusion=True)
