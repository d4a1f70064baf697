"""`lora::_row_norms` on a GPU: ‖W + s·L·R‖ of every row, W [N, K], R [r, K], L [N, r].

A program takes BLOCK_N whole rows, so that their squares are added in a fixed order. L R is a dot
of float32 operands in three parts of 11 bits ("tf32x3"). Its error, 2⁻²² of a term, is near that of
float32, and the matrix cores keep up with the memory, which the other cores ("ieee") would not.
Rows whose sum is much smaller than its terms, and float64 operands, are computed in float64. Bytes:
W is read once; R, from the L2 cache, once per program.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .integers import cdiv
from .launcher import Launch

# As in csrc/cpu/row_norms.cpp: a row is settled if its squared norm is at least this share of its
# terms' squared norm (or (r + 1) / K times that share), and far from the ends of float32's range.
SETTLED, SETTLED_SHARE = 1 / 16, 1 / 6
LEAST_SQUARE, MOST_SQUARE = tl.constexpr(1e-28), tl.constexpr(1e36)


@triton.jit
def _load_left(left, row, rank, N, r, l_row, l_col):
    """The tile rows × ranks of L."""
    mask = (row < N)[:, None] & (rank < r)[None, :]
    where = row[:, None] * l_row + rank.to(tl.int64)[None, :] * l_col
    return tl.load(left + where, mask=mask, other=0.0)


@triton.jit
def _add_product(tile, l_tile, right, rank, col, K, r, r_row, r_col):
    """tile + L R in float32, for a block of ranks."""
    mask = (rank < r)[:, None] & (col < K)[None, :]
    where = rank.to(tl.int64)[:, None] * r_row + col[None, :] * r_col
    r_tile = tl.load(right + where, mask=mask, other=0.0).to(tl.float32)
    return tl.dot(l_tile, r_tile, tile, input_precision="tf32x3")


@triton.jit
def _exact_squares(
    weight, right, left, row, scale, N, K, r, w_row, w_col, l_row, l_col, r_row, r_col,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The squares of the rows of W + s L R, added in float64."""
    total = tl.zeros([BLOCK_N], tl.float64)
    for begin in tl.range(0, K, BLOCK_K, num_stages=1):
        col = begin + tl.arange(0, BLOCK_K).to(tl.int64)
        mask = (row < N)[:, None] & (col < K)[None, :]
        where = row[:, None] * w_row + col[None, :] * w_col
        tile = tl.load(weight + where, mask=mask, other=0.0).to(tl.float64)
        for rank in tl.range(0, r, num_stages=1):
            at = rank + tl.full([], 0, tl.int64)
            l_col_k = tl.load(left + row * l_row + at * l_col, mask=row < N, other=0.0)
            r_row_k = tl.load(right + at * r_row + col * r_col, mask=col < K, other=0.0)
            tile += (scale * l_col_k.to(tl.float64))[:, None] * r_row_k.to(tl.float64)[None, :]
        tile = tl.where(mask, tile, 0.0)  # past R's end, an infinite entry of L meets zeros
        total += tl.sum(tile * tile, 1)
    return total


@triton.jit(do_not_specialize=["N"])
def row_norms_kernel(
    norms, weight, right, left, sizes,
    N, K, r, w_row, w_col, l_row, l_col, r_row, r_col,
    scale, scale_rest, share,
    DOUBLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """norms[i] = ‖(W + s L R)[i]‖. `sizes` [r] are the norms of the rows of R, in float32."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = row < N
    wide_scale = tl.full([], scale, tl.float64) + tl.full([], scale_rest, tl.float64)
    total = tl.zeros([BLOCK_N], tl.float64)
    is_settled = row >= N
    if not DOUBLE:
        terms = tl.zeros([BLOCK_N], tl.float32)
        rank = tl.arange(0, BLOCK_R)
        l_tile = scale * _load_left(left, row, rank, N, r, l_row, l_col).to(tl.float32)
        for first in tl.range(0, RANKS, BLOCK_R, num_stages=1):
            rank = first + tl.arange(0, BLOCK_R)
            size = _load_left(left, row, rank, N, r, l_row, l_col).to(tl.float32)
            size *= scale * tl.load(sizes + rank, mask=rank < r, other=0.0)[None, :]
            terms += tl.sum(size * size, 1)
        squares = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        bases = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            col = begin + tl.arange(0, BLOCK_K).to(tl.int64)
            mask = in_rows[:, None] & (col < K)[None, :]
            where = row[:, None] * w_row + col[None, :] * w_col
            tile = tl.load(weight + where, mask=mask, other=0.0).to(tl.float32)
            bases += tile * tile
            if RANKS == BLOCK_R:
                rank = tl.arange(0, BLOCK_R)
                tile = _add_product(tile, l_tile, right, rank, col, K, r, r_row, r_col)
            else:
                for first in tl.range(0, RANKS, BLOCK_R, num_stages=STAGES):
                    rank = first + tl.arange(0, BLOCK_R)
                    part = scale * _load_left(left, row, rank, N, r, l_row, l_col).to(tl.float32)
                    tile = _add_product(tile, part, right, rank, col, K, r, r_row, r_col)
            squares += tile * tile
        square = tl.sum(squares, 1)
        terms += tl.sum(bases, 1)
        total = square.to(tl.float64)
        in_range = (square >= LEAST_SQUARE) & (square <= MOST_SQUARE)
        is_settled = is_settled | (in_range & (square >= share * terms))
    if tl.min(is_settled.to(tl.int32), 0) == 0:
        exact = _exact_squares(
            weight, right, left, row, wide_scale, N, K, r, w_row, w_col, l_row, l_col, r_row, r_col,
            BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = tl.where(is_settled, total, exact)
    tl.store(norms + row, tl.sqrt(total).to(norms.dtype.element_ty), mask=in_rows)


def row_norms(
    weight: torch.Tensor, right: torch.Tensor, left: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The norms of the rows of weight + scaling · left right, [N] in float32 or float64."""
    (N, K), r = weight.shape, right.shape[0]
    is_double = torch.float64 in (weight.dtype, right.dtype, left.dtype)
    dtype = torch.float64 if is_double else torch.float32
    if N == 0 or K == 0:
        return torch.zeros(N, dtype=dtype, device=weight.device)
    norms = torch.empty(N, dtype=dtype, device=weight.device)
    sizes = norms if is_double else torch.linalg.vector_norm(right, dim=1, dtype=torch.float32)
    launch = _plan((N, K, r, *weight.stride(), *left.stride(), *right.stride()), is_double)
    single = float(torch.tensor(scaling, dtype=torch.float32))
    share = max(SETTLED, SETTLED_SHARE * (r + 1) / K)
    launch((norms, weight, right, left, sizes), (single, scaling - single, share))
    return norms


@functools.lru_cache(maxsize=1024)
def _plan(sizes: tuple[int, ...], is_double: bool) -> Launch:
    N, _, r, w_row, w_col = sizes[:5]
    block_r = 32 if 16 < r <= 32 else 16  # with 32 of more ranks, registers would spill
    by_columns = w_row < w_col
    # Wide enough for whole cache lines of a transposed W too.
    block_n, block_k = (32, 64) if by_columns else (16, 128)
    return Launch(
        row_norms_kernel,
        (cdiv(N, block_n),),
        sizes,
        DOUBLE=is_double,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        RANKS=cdiv(r, block_r) * block_r,
        STAGES=4,
        num_warps=4 if r <= 16 else 8,
        maxnreg=168 if by_columns or r > 16 else None,  # by default ptxas spills 8 bytes
        enable_fp_fusion=True,
    )
