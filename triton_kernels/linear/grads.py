"""The gradients of A and B and dz = s · dY B: sums over the rows M, without atomic operations.

dY [M, N] is read once for dz, dz₀ and dB: each program goes down a chunk of rows in a block of
columns. It computes partial sums of dz over N and of dB over M in a float32 workspace, and one
`reduce_all` adds these up in a fixed order. At M = 8192, N = 4096, r = 16 the workspace is a fifth
of dY's bytes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..integers import cdiv
from ..jobs import aligned
from ..launcher import Launch
from ..philox import drop, mask_arguments
from .rank import ENOUGH_PROGRAMS, load_Bt, load_z, rank_block, rank_unit, reduce, reduce_all

BLOCK_M, BLOCK_K = 64, 128  # for dA
DZ_ROWS, DZ_COLUMNS = 32, 256  # wide blocks, as there are N / 256 parts of dz


@triton.jit(do_not_specialize=["M", "chunk"])
def dz_dB_kernel(
    dy,
    B,
    B0,
    z,
    dz_parts,
    dz0_parts,
    dB_parts,
    M,
    N,
    r,
    chunk,
    dy_stride,
    b_row,
    b_col,
    b0_row,
    b0_col,
    HAS_START: tl.constexpr,
    NEEDS_DB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_UNIT: tl.constexpr,
):
    # All products are transposed. With the rank as rows, of which wgmma would need 64, Triton uses
    # mma.sync. With wgmma, ptxas made each instruction wait for the previous one (C7515).
    r = aligned(r, RANK_UNIT)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    b = load_Bt(B, rank, col, N, r, b_row, b_col).to(dy.dtype.element_ty)  # [BLOCK_R, BLOCK_N]
    if HAS_START:
        b0 = load_Bt(B0, rank, col, N, r, b0_row, b0_col).to(dy.dtype.element_ty)
    dB = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    begin = tl.program_id(1).to(tl.int64) * chunk
    part = tl.program_id(0).to(tl.int64) * M * r
    for m in range(begin, min(begin + chunk, M), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & (col < N)[None, :]
        g = tl.load(dy + row[:, None] * dy_stride + col[None, :], mask=mask, other=0.0)
        z_where = row[None, :] * r + rank[:, None]
        z_mask = (row < M)[None, :] & (rank < r)[:, None]
        dz = tl.dot(b, tl.trans(g), input_precision="ieee")  # [BLOCK_R, BLOCK_M]
        tl.store(dz_parts + part + z_where, dz, mask=z_mask)
        if HAS_START:
            dz0 = tl.dot(b0, tl.trans(g), input_precision="ieee")
            tl.store(dz0_parts + part + z_where, dz0, mask=z_mask)
        if NEEDS_DB:
            left = tl.trans(load_z(z, row, rank, M, r))
            dB = tl.dot(left, g, dB, input_precision="ieee")  # [BLOCK_R, BLOCK_N]
    if NEEDS_DB:
        where = tl.program_id(1).to(tl.int64) * N * r + col[None, :] * r + rank[:, None]
        tl.store(dB_parts + where, dB, mask=(col < N)[None, :] & (rank < r)[:, None])


@triton.jit(do_not_specialize=["M", "chunk", "threshold", "quad_offset"])
def dA_kernel(
    dz,
    x,
    parts,
    seed,
    M,
    K,
    r,
    chunk,
    x_stride,
    threshold,
    keep_scale,
    quad_offset,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_UNIT: tl.constexpr,
):
    """parts[chunk] = dzᵀ drop(x), summed over the chunk's rows."""
    r = aligned(r, RANK_UNIT)
    begin_col = tl.program_id(0) * BLOCK_K
    col = begin_col + tl.arange(0, BLOCK_K)
    rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if HAS_DROPOUT:
        seed_value = tl.load(seed)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    begin = tl.program_id(1).to(tl.int64) * chunk
    for m in range(begin, min(begin + chunk, M), BLOCK_M):
        row = m + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & (col < K)[None, :]
        value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
        if HAS_DROPOUT:
            value = drop(
                value, seed_value, row, begin_col, threshold, keep_scale, BLOCK_K, quad_offset
            )
        left = load_z(dz, row, rank, M, r)
        acc = tl.dot(tl.trans(left), value, acc, input_precision="ieee")  # [BLOCK_R, BLOCK_K]
    where = tl.program_id(1).to(tl.int64) * r * K + rank[:, None] * K + col[None, :]
    tl.store(parts + where, acc, mask=(rank < r)[:, None] & (col < K)[None, :])


def is_worth_it(r: int, start: bool) -> bool:
    """Whether the parts of dz and dz₀ are small compared with dY: 4 r / DZ_COLUMNS bytes per 2."""
    return r <= (16 if start else 32)


def _chunk(M: int, blocks: int) -> int:
    """The rows per program, chosen so that all programs fill a GPU about twice."""
    chunks = max(1, 2 * ENOUGH_PROGRAMS // blocks)
    return max(cdiv(cdiv(M, chunks), BLOCK_M) * BLOCK_M, BLOCK_M)


def dz_dB(
    dy: torch.Tensor,
    B: torch.Tensor,
    B0: torch.Tensor | None,
    z: torch.Tensor,
    scale: float,
    needs_B: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dz = scale · dY B, dz₀ = −scale · dY B₀ [M, r] in dY's dtype, dB = scale · dYᵀ z in B's.

    dY's rows and z are contiguous, and `is_worth_it` is true for r.
    """
    (M, N), r = dy.shape, B.shape[1]
    start = B if B0 is None else B0
    launch = _plan_dz_dB(
        (M, N, r), (dy.stride(0), *B.stride(), *start.stride()), B0 is not None, needs_B
    )
    blocks, chunks = launch.grid
    work = {"dtype": torch.float32, "device": dy.device}
    dz_parts = torch.empty((blocks, M, r), **work)
    dz0_parts = None if B0 is None else torch.empty_like(dz_parts)
    dB_parts = torch.empty((chunks, N, r), **work) if needs_B else None
    launch(
        (
            dy,
            B,
            start,
            z,
            dz_parts,
            dz_parts if dz0_parts is None else dz0_parts,
            dz_parts if dB_parts is None else dB_parts,
        )
    )
    sums = [(dz_parts, dy.dtype, scale)]
    sums += [] if dz0_parts is None else [(dz0_parts, dy.dtype, -scale)]
    sums += [] if dB_parts is None else [(dB_parts, B.dtype, scale)]
    done = iter(reduce_all(sums))
    return next(done), *(None if p is None else next(done) for p in (dz0_parts, dB_parts))


@functools.lru_cache(maxsize=1024)
def _plan_dz_dB(
    sizes: tuple[int, int, int], strides: tuple[int, ...], has_start: bool, needs_B: bool
) -> Launch:
    M, N, r = sizes
    blocks = cdiv(N, DZ_COLUMNS)
    chunk = _chunk(M, blocks)
    return Launch(
        dz_dB_kernel,
        (blocks, cdiv(M, chunk)),
        (*sizes, chunk, *strides),
        HAS_START=has_start,
        NEEDS_DB=needs_B,
        BLOCK_M=DZ_ROWS,
        BLOCK_N=DZ_COLUMNS,
        BLOCK_R=rank_block(r, 32),
        RANK_UNIT=rank_unit(r),
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=3,
    )


def dA(
    dz: torch.Tensor,
    x: torch.Tensor,
    dtype: torch.dtype,
    dropout: float,
    seed: torch.Tensor | None,
    col_offset: int = 0,
) -> torch.Tensor:
    """dzᵀ drop(x) [r, K] as `dtype`; dz and the rows of x are contiguous."""
    (M, K), r = x.shape, dz.shape[1]
    launch = _plan_dA((M, K, r), x.stride(0), dropout > 0)
    parts = torch.empty((launch.grid[1], r, K), dtype=torch.float32, device=x.device)
    launch((dz, x, parts, x if seed is None else seed), (*mask_arguments(dropout), col_offset // 4))
    return reduce(parts, dtype)


@functools.lru_cache(maxsize=1024)
def _plan_dA(sizes: tuple[int, int, int], x_stride: int, has_dropout: bool) -> Launch:
    M, K, r = sizes
    block_r = rank_block(r, 128)
    blocks, ranks = cdiv(K, BLOCK_K), cdiv(r, block_r)
    chunk = _chunk(M, blocks * ranks)
    return Launch(
        dA_kernel,
        (blocks, cdiv(M, chunk), ranks),
        (*sizes, chunk, x_stride),
        HAS_DROPOUT=has_dropout,
        # The mask needs registers, and so do 128 ranks.
        BLOCK_M=BLOCK_M // 2 if has_dropout or block_r > 64 else BLOCK_M,
        BLOCK_K=BLOCK_K,
        BLOCK_R=block_r,
        RANK_UNIT=rank_unit(r),
        # With 8 warps and no mask, each wgmma waits for the previous one in Triton 3.6 (C7515).
        num_warps=8 if block_r > 64 and has_dropout else 4,
        enable_fp_fusion=True,
        num_stages=3,
    )
