"""z = drop(x) Aᵀ and z₀ = x A₀ᵀ in one pass over x [M, K], for ranks up to 128.

Bytes: x is read once; A, with r · K values, is in the L2 cache. Where the rows alone give too few
programs, K is split; `reduce`, or the decode kernel, then adds up the parts in order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..integers import cdiv, next_power_of_2
from ..jobs import aligned
from ..launcher import Launch
from ..philox import drop, mask_arguments
from .rank import ENOUGH_PROGRAMS, load_Bt, rank_block, rank_unit, reduce, thin_product


@triton.jit(do_not_specialize=["M", "threshold", "quad_offset"])
def shrink_kernel(
    x,
    A,
    A0,
    out,
    out0,
    seed,
    M,
    K,
    r,
    x_stride,
    a_row,
    a_col,
    a0_row,
    a0_col,
    split_length,
    threshold,
    keep_scale,
    quad_offset,
    HAS_START: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    r = aligned(r, RANK_UNIT)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2)
    if HAS_DROPOUT:
        seed_value = tl.load(seed)
    # If transposed, the computed operand (x after dropout) is the right factor of the products and
    # goes through shared memory. As the left factor, in registers, it made each wgmma wait for the
    # previous one where A needs no conversion (C7515).
    TRANSPOSED: tl.constexpr = HAS_DROPOUT and A.dtype.element_ty == x.dtype.element_ty
    shape: tl.constexpr = [BLOCK_R, BLOCK_M] if TRANSPOSED else [BLOCK_M, BLOCK_R]
    acc, acc0 = tl.zeros(shape, tl.float32), tl.zeros(shape, tl.float32)
    for k in range(part * split_length, min((part + 1) * split_length, K), BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        x_mask = (row < M)[:, None] & (col < K)[None, :]
        value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=x_mask, other=0.0)
        if HAS_START:
            a0 = load_Bt(A0, col, rank, r, K, a0_row, a0_col).to(value.dtype)
            acc0 = thin_product(value, a0, acc0, TRANSPOSED)
        if HAS_DROPOUT:
            value = drop(value, seed_value, row, k, threshold, keep_scale, BLOCK_K, quad_offset)
        a = load_Bt(A, col, rank, r, K, a_row, a_col).to(value.dtype)
        acc = thin_product(value, a, acc, TRANSPOSED)
    if TRANSPOSED:
        acc, acc0 = tl.trans(acc), tl.trans(acc0)
    where = part * M.to(tl.int64) * r + row[:, None] * r + rank[None, :]
    mask = (row < M)[:, None] & (rank < r)[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=mask)
    if HAS_START:
        tl.store(out0 + where, acc0.to(out0.dtype.element_ty), mask=mask)


def _blocks(
    M: int, block_r: int, bytes_of_A: int, has_start: bool, has_dropout: bool, beside: bool
) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_K, num_warps and num_stages, chosen to fit in the registers and in the shared
    memory of the smallest GPUs (99 KB).
    """
    block_m = min(max(16, next_power_of_2(M)), 64)
    if beside:
        return block_m, 64, 4, 4 if block_r <= 16 else 3
    stages = 4 if block_r <= 32 else 3
    if block_r > 64 and M > 64 and not has_start:
        # Each program reads all of A through the L2 cache: with 64 rows, four times the bytes of x.
        # (With 16-bit A and 8 warps, each wgmma waits for the previous one in Triton 3.6, C7515.)
        return (128, 64, 4, 3) if bytes_of_A == 2 and not has_dropout else (128, 32, 8, 4)
    block_k = 128 if block_r <= 32 else 64 if block_r <= 64 else 32
    if has_start:
        block_k = max(block_k // (4 if has_dropout else 2), 32)
    many = (block_r > 64 and has_start) or (block_r == 64 and 16 < M <= 64)  # 4 warps would spill
    return block_m, block_k, 8 if many else 4, stages


def shrink_parts(
    x: torch.Tensor,
    A: torch.Tensor,
    A0: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    parts: int | None = None,
    overlap: bool = False,
    beside: bool = False,
    col_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z and z₀ as parts [S, M, r], to be added over S; in x's dtype if S = 1, else in float32.

    With `overlap` the next kernel may start together with this one, but must wait before it reads
    the parts. With `beside`, which does not support A₀, this kernel leaves the next one most of the
    shared memory of a multiprocessor: 180 of 228 KB.
    """
    start = A if A0 is None else A0
    launch, parts = _plan(
        x.shape,
        A.shape[0],
        A.element_size(),
        x.stride(0),
        A.stride(),
        start.stride(),
        A0 is not None,
        dropout > 0,
        parts,
        overlap,
        beside,
    )
    dtype = x.dtype if parts == 1 else torch.float32
    out = torch.empty((parts, x.shape[0], A.shape[0]), dtype=dtype, device=x.device)
    out0 = None if A0 is None else torch.empty_like(out)
    others = (out if out0 is None else out0, x if seed is None else seed)
    launch((x, A, start, out, *others), (*mask_arguments(dropout), col_offset // 4))
    return out, out0


@functools.lru_cache(maxsize=1024)
def _plan(
    shape: torch.Size,
    r: int,
    bytes_of_A: int,
    x_stride: int,
    a_strides: tuple[int, int],
    start_strides: tuple[int, int],
    has_start: bool,
    has_dropout: bool,
    parts: int | None,
    overlap: bool,
    beside: bool,
) -> tuple[Launch, int]:
    """(the launch, the number of parts of z)."""
    M, K = shape
    block_r = rank_block(r, 128)
    block_m, block_k, warps, stages = _blocks(
        M, block_r, bytes_of_A, has_start, has_dropout, beside
    )
    programs = cdiv(M, block_m) * cdiv(r, block_r)
    if parts is None:
        parts = max(1, ENOUGH_PROGRAMS // programs)
    length = cdiv(cdiv(K, parts), block_k) * block_k
    parts = cdiv(K, length)
    launch = Launch(
        shrink_kernel,
        (cdiv(M, block_m), cdiv(r, block_r), parts),
        (M, K, r, x_stride, *a_strides, *start_strides, length),
        HAS_START=has_start,
        HAS_DROPOUT=has_dropout,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        RANK_UNIT=rank_unit(r),
        OVERLAP=overlap,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=stages,
    )
    return launch, parts


def shrink(
    x: torch.Tensor,
    A: torch.Tensor,
    A0: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    col_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z [M, r] = drop(x) Aᵀ and z₀ = x A₀ᵀ in x's dtype; the rows of x are contiguous."""
    out, out0 = shrink_parts(x, A, A0, dropout, seed, col_offset=col_offset)
    if out.shape[0] == 1:
        return out[0], None if out0 is None else out0[0]
    return reduce(out, x.dtype), None if out0 is None else reduce(out0, x.dtype)
