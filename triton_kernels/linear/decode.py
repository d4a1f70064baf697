"""The layer for few rows (M <= 64), in two kernels that read W [N, K] once.

The first kernel writes z in parts (`shrink_parts`); each program of the second kernel adds up these
parts after its K loop. On Hopper and later, the second kernel starts together with the first and
waits for it only after the K loop, so that W is read meanwhile. Bytes: W; x, A and the parts are in
the caches.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..integers import cdiv, next_power_of_2
from ..jobs import aligned
from ..launcher import Launch
from .rank import ENOUGH_PROGRAMS, load_Bt, rank_block, rank_unit
from .shrink import shrink_parts

MOST_ROWS = 64
PARTS = 16
BLOCK_N, BLOCK_K = 32, 128


@triton.jit
def _sum_of_parts(parts, where, mask, stride, PARTS: tl.constexpr, UNROLL: tl.constexpr):
    total = tl.zeros(where.shape, tl.float32)
    for part in tl.range(0, PARTS, loop_unroll_factor=UNROLL):
        total += tl.load(parts + part * stride + where, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _add_rank_term(
    acc, parts, B, early, z, row, col, M, N, r, b_row, b_col, scale, SAVE: tl.constexpr,
    PARTS: tl.constexpr, UNROLL: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """acc + scale · z Bᵀ, with z added up from its parts; `early` is Bᵀ if it is already loaded."""
    for first in tl.range(0, RANKS, BLOCK_R, num_stages=1):
        rank = first + tl.arange(0, BLOCK_R)
        mask = (row < M)[:, None] & (rank < r)[None, :]
        where = row[:, None] * r + rank[None, :]
        left = _sum_of_parts(parts, where, mask, M * r, PARTS, UNROLL).to(z.dtype.element_ty)
        if SAVE and tl.program_id(0) == 0:
            tl.store(z + where, left, mask=mask)
        right = early if EARLY else load_Bt(B, rank, col, N, r, b_row, b_col).to(left.dtype)
        acc += scale * tl.dot(left, right, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    x,
    W,
    bias,
    y,
    z,
    parts,
    B,
    parts0,
    B0,
    M,
    N,
    K,
    r,
    x_stride,
    w_row,
    w_col,
    b_row,
    b_col,
    b0_row,
    b0_col,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    UNROLL: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    r = aligned(r, RANK_UNIT)
    row = tl.arange(0, BLOCK_M).to(tl.int64)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Loaded here, B and the bias overlap with W; after the loop nothing would hide their latency.
    early, early0, offset = 0.0, 0.0, 0.0
    if EARLY:
        rank = tl.arange(0, BLOCK_R)
        early = load_Bt(B, rank, col, N, r, b_row, b_col).to(z.dtype.element_ty)
        if HAS_START:
            early0 = load_Bt(B0, rank, col, N, r, b0_row, b0_col).to(z.dtype.element_ty)
    if HAS_BIAS:
        offset = tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        x_mask = (row < M)[:, None] & (k < K)[None, :]
        w_mask = (col < N)[None, :] & (k < K)[:, None]
        left = tl.load(x + row[:, None] * x_stride + k[None, :], mask=x_mask, other=0.0)
        where = col[None, :].to(tl.int64) * w_row + k[:, None].to(tl.int64) * w_col
        # W is used once, so it should not displace x and the parts of z from the L2 cache.
        right = tl.load(W + where, mask=w_mask, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(left, right, acc, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    acc = _add_rank_term(
        acc, parts, B, early, z, row, col, M, N, r, b_row, b_col, scale,
        True, PARTS, UNROLL, RANKS, BLOCK_R, EARLY,
    )  # fmt: skip
    if HAS_START:
        acc = _add_rank_term(
            acc, parts0, B0, early0, z, row, col, M, N, r, b0_row, b0_col, -scale,
            False, PARTS, UNROLL, RANKS, BLOCK_R, EARLY,
        )  # fmt: skip
    if HAS_BIAS:
        acc += offset[None, :]
    mask = (row < M)[:, None] & (col < N)[None, :]
    tl.store(y + row[:, None] * N + col[None, :], acc.to(y.dtype.element_ty), mask=mask)


def _constants(M: int, N: int, r: int, has_start: bool, overlap: bool) -> dict[str, int]:
    """The constants of `decode_kernel`: its blocks and the depth of its pipeline."""
    block_m = max(16, next_power_of_2(M))
    most = (
        128 if M <= 16 else 32 if has_start else 64
    )  # ranks of B kept in registers during the K loop
    block_r = rank_block(r, most if r <= most else 16 if has_start else 32)
    ranks = cdiv(r, block_r) * block_r
    tile = block_m * block_r
    unroll = max(1, 4096 // (tile * (2 if has_start else 1)))
    unroll = 8 if tile <= 512 or (block_m <= 16 and tile <= 1024) else min(unroll, 8)
    stages = 4
    if overlap and cdiv(N, BLOCK_N) < 2 * ENOUGH_PROGRAMS:
        # Hopper's memory needs about 40 KB in flight per multiprocessor, and a stage loads 8 KB of
        # W. Two programs with 3 stages each have that; a single program needs more stages.
        stages = 8 if block_m <= 32 else 6
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "BLOCK_R": block_r,
        "RANKS": ranks,
        "RANK_UNIT": rank_unit(r),
        "UNROLL": unroll,  # parts of z in flight, as many as fit in registers
        "EARLY": ranks == block_r,
        "num_stages": stages,
    }


def decode(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    dropout: float,
    seed: torch.Tensor | None,
    A0: torch.Tensor | None,
    B0: torch.Tensor | None,
    overlap: bool,
    col_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] and z [M, r] in x's dtype, for M <= 64. `overlap` needs Hopper or later."""
    (M, K), (N, r) = x.shape, B.shape
    parts, parts0 = shrink_parts(x, A, A0, dropout, seed, PARTS, overlap, col_offset=col_offset)
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    z = torch.empty((M, r), dtype=x.dtype, device=x.device)
    start = B if B0 is None else B0
    launch = _plan(
        (M, N, K, r, x.stride(0), *weight.stride(), *B.stride(), *start.stride()),
        parts.shape[0],
        bias is not None,
        A0 is not None,
        overlap,
    )
    launch(
        (
            x,
            weight,
            x if bias is None else bias,
            y,
            z,
            parts,
            B,
            parts if parts0 is None else parts0,
            start,
        ),
        (scale,),
    )
    return y, z


@functools.lru_cache(maxsize=1024)
def _plan(
    sizes: tuple[int, ...], parts: int, has_bias: bool, has_start: bool, overlap: bool
) -> Launch:
    M, N, _, r = sizes[:4]
    return Launch(
        decode_kernel,
        (cdiv(N, BLOCK_N),),
        sizes,
        HAS_BIAS=has_bias,
        HAS_START=has_start,
        PARTS=parts,
        OVERLAP=overlap,
        launch_pdl=overlap,
        num_warps=4,
        enable_fp_fusion=True,
        **_constants(M, N, r, has_start, overlap),
    )
