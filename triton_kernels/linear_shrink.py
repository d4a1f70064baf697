"""z = drop(x) Aᵀ, and z₀ = x A₀ᵀ beside it: one pass over x [M, K] for ranks up to 128.

Bytes: x once (A, r · K values, comes from the L2 cache). Where the rows alone are too few programs,
K is split; the parts are added up in order by `reduce`, or by the decode kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .jobs import aligned
from .linear_rank import ENOUGH_PROGRAMS, rank_block, rank_unit, reduce
from .philox import drop, mask_arguments


@triton.jit(do_not_specialize=["M", "threshold"])
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
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    acc0 = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(part * split_length, min((part + 1) * split_length, K), BLOCK_K):
        col = k + tl.arange(0, BLOCK_K)
        x_mask = (row < M)[:, None] & (col < K)[None, :]
        a_mask = (rank < r)[None, :] & (col < K)[:, None]
        value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=x_mask, other=0.0)
        if HAS_START:
            a0 = tl.load(
                A0 + rank[None, :] * a0_row + col[:, None] * a0_col, mask=a_mask, other=0.0
            )
            acc0 = tl.dot(value, a0.to(value.dtype), acc0, input_precision="ieee")
        if HAS_DROPOUT:
            value = drop(value, seed_value, row, k, threshold, keep_scale, BLOCK_K)
        a = tl.load(A + rank[None, :] * a_row + col[:, None] * a_col, mask=a_mask, other=0.0)
        acc = tl.dot(value, a.to(value.dtype), acc, input_precision="ieee")  # [BLOCK_M, BLOCK_R]
    where = part * M.to(tl.int64) * r + row[:, None] * r + rank[None, :]
    mask = (row < M)[:, None] & (rank < r)[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=mask)
    if HAS_START:
        tl.store(out0 + where, acc0.to(out0.dtype.element_ty), mask=mask)


def shrink_parts(
    x: torch.Tensor,
    A: torch.Tensor,
    A0: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    parts: int | None = None,
    overlap: bool = False,
    beside: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z and z₀ as parts [S, M, r] that are to be added up: in x's dtype if S is 1, else float32.

    With `overlap` the next kernel may start with this one; it has to wait before it reads them.
    `beside`: it leaves that kernel most of a multiprocessor, 180 of 228 KB. (No start then.)
    """
    (M, K), r = x.shape, A.shape[0]
    block_r = rank_block(r, 128)
    block_m = min(max(16, triton.next_power_of_2(M)), 64)
    # What registers, and the shared memory of the smallest GPUs (99 KB), hold.
    block_k = 128 if block_r <= 32 else 64 if block_r <= 64 else 32
    if A0 is not None:
        block_k = max(block_k // (4 if dropout > 0 else 2), 32)
    stages = 4 if block_r <= 32 else 3
    if beside:
        block_k, stages = 64, 4 if block_r <= 16 else 3
    programs = triton.cdiv(M, block_m) * triton.cdiv(r, block_r)
    if parts is None:
        parts = max(1, ENOUGH_PROGRAMS // programs)
    length = triton.cdiv(triton.cdiv(K, parts), block_k) * block_k
    parts = triton.cdiv(K, length)
    dtype = x.dtype if parts == 1 else torch.float32
    out = torch.empty(parts, M, r, dtype=dtype, device=x.device)
    out0 = None if A0 is None else torch.empty_like(out)
    start = A if A0 is None else A0
    shrink_kernel[triton.cdiv(M, block_m), triton.cdiv(r, block_r), parts](
        x,
        A,
        start,
        out,
        out if out0 is None else out0,
        x if seed is None else seed,
        M,
        K,
        r,
        x.stride(0),
        *A.stride(),
        *start.stride(),
        length,
        *mask_arguments(dropout),
        HAS_START=A0 is not None,
        HAS_DROPOUT=dropout > 0,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        RANK_UNIT=rank_unit(r),
        OVERLAP=overlap,
        num_warps=8 if block_r > 64 and A0 is not None else 4,
        enable_fp_fusion=True,
        num_stages=stages,
    )
    return out, out0


def shrink(
    x: torch.Tensor,
    A: torch.Tensor,
    A0: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z [M, r] = drop(x) Aᵀ and z₀ = x A₀ᵀ in x's dtype; x's rows are contiguous."""
    out, out0 = shrink_parts(x, A, A0, dropout, seed)
    if out.shape[0] == 1:
        return out[0], None if out0 is None else out0[0]
    return reduce(out, x.dtype), None if out0 is None else reduce(out0, x.dtype)
