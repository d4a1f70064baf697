"""y = bias + scale · drop(z Bᵀ) + scale₀ · z₀ B₀ᵀ [M, N], written once.

cuBLAS then adds the product with W in place (beta = 1); its reads of y overlap with its arithmetic.
`drop` is for dX, where the mask applies to the result.
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
from .rank import load_Bt, load_z, rank_block, rank_unit

BLOCK_M, BLOCK_N = 64, 128


@triton.jit
def rank_product(z, B, row, col, M, N, r, b_row, b_col, RANKS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The tile rows × cols of z Bᵀ in float32, with B rounded to z's dtype."""
    acc = tl.zeros([row.shape[0], col.shape[0]], tl.float32)
    for first in tl.static_range(0, RANKS, BLOCK_R):
        rank = first + tl.arange(0, BLOCK_R)
        left = load_z(z, row, rank, M, r)
        right = load_Bt(B, rank, col, N, r, b_row, b_col).to(left.dtype)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M", "threshold", "quad_offset"])
def expand_kernel(
    y,
    bias,
    z,
    B,
    z0,
    B0,
    seed,
    M,
    N,
    r,
    b_row,
    b_col,
    b0_row,
    b0_col,
    scale,
    scale0,
    threshold,
    keep_scale,
    quad_offset,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr,
    RANK_UNIT: tl.constexpr,
):
    r = aligned(r, RANK_UNIT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * BLOCK_N
    col = begin + tl.arange(0, BLOCK_N)
    value = scale * rank_product(z, B, row, col, M, N, r, b_row, b_col, RANKS, BLOCK_R)
    if HAS_DROPOUT:
        word = tl.load(seed)
        value = drop(value, word, row, begin, threshold, keep_scale, BLOCK_N, quad_offset)
    if HAS_START:
        value += scale0 * rank_product(z0, B0, row, col, M, N, r, b0_row, b0_col, RANKS, BLOCK_R)
    if HAS_BIAS:
        value += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    mask = (row < M)[:, None] & (col < N)[None, :]
    where = row[:, None] * N + col[None, :]
    tl.store(y + where, value.to(y.dtype.element_ty), mask=mask)


def expand(
    z: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    z0: torch.Tensor | None = None,
    B0: torch.Tensor | None = None,
    scale0: float = 0.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    col_offset: int = 0,
) -> torch.Tensor:
    """y [M, N] in z's dtype from z, z0 [M, r] (contiguous), B, B0 [N, r] and bias [N]."""
    (M, r), N = z.shape, B.shape[0]
    y = torch.empty((M, N), dtype=z.dtype, device=z.device)
    start = B if B0 is None else B0
    launch = _plan(
        (M, N, r, *B.stride(), *start.stride()), bias is not None, z0 is not None, dropout > 0
    )
    launch(
        (
            y,
            y if bias is None else bias,
            z,
            B,
            z if z0 is None else z0,
            start,
            z if seed is None else seed,
        ),
        (scale, scale0, *mask_arguments(dropout), col_offset // 4),
    )
    return y


@functools.lru_cache(maxsize=1024)
def _plan(sizes: tuple[int, ...], has_bias: bool, has_start: bool, has_dropout: bool) -> Launch:
    M, N, r = sizes[:3]
    block_r = rank_block(r, 32)
    return Launch(
        expand_kernel,
        (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N)),
        sizes,
        HAS_BIAS=has_bias,
        HAS_START=has_start,
        HAS_DROPOUT=has_dropout,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_R=block_r,
        RANKS=cdiv(r, block_r) * block_r,
        RANK_UNIT=rank_unit(r),
        num_warps=8,
        enable_fp_fusion=True,
    )
