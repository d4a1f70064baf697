"""out = a Wᵀ (or a W) + bias + scale · z Bᵀ + scale₀ · z₀ B₀ᵀ in one kernel, for Hopper and later.

A persistent GEMM: tiles by the tensor memory accelerator, the rank products after the K loop into
the same float32 accumulator. Before the loop they would hold shared memory that the pipeline needs.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .integers import cdiv
from .jobs import aligned
from .launcher import Launch
from .linear_rank import load_Bt, load_z, rank_block, rank_unit

GROUP_M = 8
LARGEST_RANK = 128  # above it the rank term, which nothing overlaps, is no longer small
CONFIGS = {  # name: (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages, programs a multiprocessor)
    "fused": (128, 256, 64, 8, 3, 1),
    "fused pair": (128, 128, 64, 4, 3, 2),  # one's rank term beside the other's K loop
}


@triton.jit
def _add_rank_term(
    acc, z, B, row, col, M, N, r, b_row, b_col, scale, RANKS: tl.constexpr, BLOCK_R: tl.constexpr
):
    """acc + z (scale · B)ᵀ: the scale goes into B before its rounding, so that one dot adds on."""
    for first in tl.range(0, RANKS, BLOCK_R, num_stages=1):
        rank = first + tl.arange(0, BLOCK_R)
        left = load_z(z, row, rank, M, r)
        right = load_Bt(B, rank, col, N, r, b_row, b_col)
        right = (scale * right.to(tl.float32)).to(left.dtype)
        acc = tl.dot(left, right, acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    a,
    w,
    out,
    bias,
    z,
    B,
    z0,
    B0,
    M,
    N,
    K,
    r,
    b_row,
    b_col,
    b0_row,
    b0_col,
    scale,
    scale0,
    W_IS_KN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    r = aligned(r, RANK_UNIT)
    rows_of_tiles, cols_of_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = GROUP_M * cols_of_tiles
    for tile in tl.range(tl.program_id(0), rows_of_tiles * cols_of_tiles, tl.num_programs(0)):
        # Groups of GROUP_M rows of tiles share what the L2 cache holds of W.
        first = tile // group * GROUP_M
        height = min(rows_of_tiles - first, GROUP_M)
        m = (first + tile % group % height) * BLOCK_M
        n = tile % group // height * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            left = a.load([m, k])
            if W_IS_KN:
                acc = tl.dot(left, w.load([k, n]), acc)
            else:
                acc = tl.dot(left, w.load([n, k]).T, acc)
        row = m + tl.arange(0, BLOCK_M)
        col = n + tl.arange(0, BLOCK_N)
        row64 = row.to(tl.int64)
        acc = _add_rank_term(acc, z, B, row64, col, M, N, r, b_row, b_col, scale, RANKS, BLOCK_R)
        if HAS_START:
            acc = _add_rank_term(
                acc, z0, B0, row64, col, M, N, r, b0_row, b0_col, scale0, RANKS, BLOCK_R
            )
        if HAS_BIAS:
            acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        # In halves: a whole tile on its way out would take the place of a pipeline stage.
        halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
        left_half, right_half = tl.split(halves)
        out.store([m, n], left_half.to(out.dtype))
        out.store([m, n + BLOCK_N // 2], right_half.to(out.dtype))


@functools.cache
def offered(r: int, start: bool) -> tuple[str, ...]:
    """The configurations for rank r (2r with a start) that compile without spills."""
    if r % 8 or (2 * r if start else r) > LARGEST_RANK:
        return ()
    return ("fused",) if start else tuple(CONFIGS)


def fits(matrix: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator takes it: 16-bit, rows at multiples of 16 bytes."""
    row, column = matrix.stride()
    return (
        column == 1
        and row > 0
        and row % 8 == 0
        and matrix.element_size() == 2
        and matrix.data_ptr() % 16 == 0
        and matrix.numel() > 0
        and max(matrix.shape) < 2**31
    )


def gemm(
    config: str,
    multiprocessors: int,
    a: torch.Tensor,
    weight: torch.Tensor,
    w_is_kn: bool,
    z: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    z0: torch.Tensor | None = None,
    B0: torch.Tensor | None = None,
    scale0: float = 0.0,
) -> torch.Tensor:
    """a [M, K] times weight [N, K] transposed, or weight [K, N], and the rank terms.

    z, z0 [M, r] are contiguous, B, B0 [N, r] of any strides.
    """
    (M, K), (N, r) = a.shape, B.shape
    out = torch.empty((M, N), dtype=a.dtype, device=a.device)
    start = B if B0 is None else B0
    launch = _plan(
        config,
        multiprocessors,
        w_is_kn,
        (M, N, K, r, *B.stride(), *start.stride()),
        bias is not None,
        z0 is not None,
    )
    launch(
        (
            a,
            weight,
            out,
            a if bias is None else bias,
            z,
            B,
            z if z0 is None else z0,
            start,
        ),
        (scale, scale0),
    )
    return out


@functools.lru_cache(maxsize=1024)
def _plan(
    config: str,
    multiprocessors: int,
    w_is_kn: bool,
    sizes: tuple[int, ...],
    has_bias: bool,
    has_start: bool,
) -> Launch:
    block_m, block_n, block_k, warps, stages, resident = CONFIGS[config]
    M, N, _, r = sizes[:4]
    w_block = [block_k, block_n] if w_is_kn else [block_n, block_k]
    block_r = rank_block(r, 16 if has_start else 32)  # more spills
    ranks = cdiv(r, block_r) * block_r
    if has_start:
        # A loop of one turn is unrolled, and sm_100 has no room for the accumulators then.
        ranks = max(ranks, 2 * block_r)
    tiles = cdiv(M, block_m) * cdiv(N, block_n)
    return Launch(
        gemm_kernel,
        (min(resident * multiprocessors, tiles),),
        sizes,
        ([block_m, block_k], w_block, [block_m, block_n // 2]),
        W_IS_KN=w_is_kn,
        HAS_BIAS=has_bias,
        HAS_START=has_start,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        RANKS=ranks,
        RANK_UNIT=rank_unit(r),
        GROUP_M=GROUP_M,
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=stages,
    )
