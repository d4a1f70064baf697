"""z = scale · drop(x[rows]) Aₑᵀ and z₀ = scale₀ · x[rows] A₀ₑᵀ, with the A of each row's expert.

The kernel gathers the rows of x itself, so that x in the order of the experts is never in memory.
In the backward it computes dz = s · dY Bₑ, with B viewed as [E, r, N].
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..integers import cdiv
from ..jobs import aligned
from ..launcher import Launch
from ..linear.rank import load_Bt, rank_block, rank_unit, thin_product
from ..philox import drop, mask_arguments
from .schedule import Schedule, load_tile


@triton.jit(do_not_specialize=["E", "threshold"])
def grouped_shrink_kernel(
    x,
    rows,
    A,
    A0,
    out,
    out0,
    seed,
    tiles,
    firsts,
    E,
    K,
    r,
    x_stride,
    a_expert,
    a_row,
    a_col,
    a0_expert,
    a0_row,
    a0_col,
    scale,
    scale0,
    threshold,
    keep_scale,
    HAS_ROWS: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_UNIT: tl.constexpr,
):
    r = aligned(r, RANK_UNIT)
    tile = tl.program_id(0) // (TILE_ROWS // BLOCK_M)
    if tile >= tl.load(firsts + E + 1):
        return
    expert, begin, end = load_tile(tiles, tile)
    begin += tl.program_id(0) % (TILE_ROWS // BLOCK_M) * BLOCK_M
    if begin >= end:
        return
    row = begin + tl.arange(0, BLOCK_M)
    inside = row < end
    row64 = row.to(tl.int64)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    depth = tl.where(expert < E, K, 0)  # rows of no expert get zeros
    source = tl.load(rows + row64, mask=inside, other=0) if HAS_ROWS else row64
    if HAS_DROPOUT:
        seed_value = tl.load(seed)
    A += expert.to(tl.int64) * a_expert
    A0 += expert.to(tl.int64) * a0_expert
    # As in `linear.shrink`: with a computed left factor in registers, each wgmma would wait for the
    # previous one where A needs no conversion (C7515).
    TRANSPOSED: tl.constexpr = HAS_DROPOUT and A.dtype.element_ty == x.dtype.element_ty
    shape: tl.constexpr = [BLOCK_R, BLOCK_M] if TRANSPOSED else [BLOCK_M, BLOCK_R]
    acc, acc0 = tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32)
    for k in range(0, depth, BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        x_mask = inside[:, None] & (col < K)[None, :]
        value = tl.load(x + source[:, None] * x_stride + col[None, :], mask=x_mask, other=0.0)
        if HAS_START:
            a0 = load_Bt(A0, col, rank, r, K, a0_row, a0_col).to(value.dtype)
            acc0 = thin_product(value, a0, acc0, TRANSPOSED)
        if HAS_DROPOUT:
            value = drop(value, seed_value, row64, k, threshold, keep_scale, BLOCK_K)
        a = load_Bt(A, col, rank, r, K, a_row, a_col).to(value.dtype)
        acc = thin_product(value, a, acc, TRANSPOSED)
    if TRANSPOSED:
        acc, acc0 = tl.trans(acc), tl.trans(acc0)
    where = row64[:, None] * r + rank[None, :]
    mask = inside[:, None] & (rank < r)[None, :]
    tl.store(out + where, (scale * acc).to(out.dtype.element_ty), mask=mask)
    if HAS_START:
        tl.store(out0 + where, (scale0 * acc0).to(out0.dtype.element_ty), mask=mask)


def shrink(
    x: torch.Tensor,
    rows: torch.Tensor | None,
    A: torch.Tensor,
    A0: torch.Tensor | None,
    tiles: Schedule,
    size: int,
    scale: float = 1.0,
    scale0: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z and z₀ [size, r] in x's dtype, zero in rows of no expert; the rows of x are contiguous.

    A and A₀ are [E, r, K] of any strides, r >= 1.
    """
    E, r, K = A.shape
    out = torch.empty((size, r), dtype=x.dtype, device=x.device)
    out0 = None if A0 is None else torch.empty_like(out)
    start = A if A0 is None else A0
    launch = _plan(
        (E, K, r, x.stride(0), *A.stride(), *start.stride()),
        (tiles.limit, tiles.rows),
        x.element_size() == 4,
        rows is not None,
        A0 is not None,
        dropout > 0,
    )
    launch(
        (
            x,
            x if rows is None else rows,
            A,
            start,
            out,
            out if out0 is None else out0,
            x if seed is None else seed,
            tiles.tiles,
            tiles.firsts,
        ),
        (scale, scale0, *mask_arguments(dropout)),
    )
    return out, out0


def _blocks(
    r: int, wide: bool, has_start: bool, has_dropout: bool
) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_K, BLOCK_R, num_warps and num_stages, chosen to fit in the registers and in
    the shared memory of the smallest GPUs (99 KB).
    """
    if wide:
        return 32, 32, rank_block(r, 32), 4, 2
    block_r = rank_block(r, 128)
    block_k = 128 if block_r <= 32 else 64 if block_r <= 64 else 32
    if has_start:
        block_k = max(block_k // (4 if has_dropout else 2), 32)
    warps = 8 if block_r > 64 and has_start else 4  # 4 would spill
    return 64, block_k, block_r, warps, 4 if block_r <= 32 else 3


@functools.lru_cache(maxsize=1024)
def _plan(
    sizes: tuple[int, ...],
    tiles: tuple[int, int],
    wide: bool,
    has_rows: bool,
    has_start: bool,
    has_dropout: bool,
) -> Launch:
    limit, tile_rows = tiles
    r = sizes[2]
    block_m, block_k, block_r, warps, stages = _blocks(r, wide, has_start, has_dropout)
    return Launch(
        grouped_shrink_kernel,
        (limit * (tile_rows // block_m), cdiv(r, block_r)),
        sizes,
        HAS_ROWS=has_rows,
        HAS_START=has_start,
        HAS_DROPOUT=has_dropout,
        TILE_ROWS=tile_rows,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        RANK_UNIT=rank_unit(r),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
