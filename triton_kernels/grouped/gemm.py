"""out = a[rows] Wₑᵀ + biasₑ + scale · drop(z Bₑᵀ) + scale₀ · z₀ B₀ₑᵀ, where e is a row's expert.

A persistent GEMM over the tiles of a schedule. The rank terms are added to the same float32
accumulator after the K loop. Where the GPU and the sizes allow it, the tensor memory accelerator
loads W as a 3-D tensor, so that it reads zeros past the end of K, not the next expert. Rows are
stored by pointers with a mask: the accelerator would also overwrite rows of the next expert.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..integers import cdiv
from ..jobs import aligned
from ..launcher import Launch
from ..linear.rank import (
    add_rank_term,
    load_Bt,
    load_z,
    rank_block,
    rank_operands,
    rank_unit,
)
from ..philox import drop, mask_arguments
from .schedule import Schedule, load_tile

GROUP_M = 8
MOST_EARLY = 32  # ranks whose operands are loaded before the K loop
FEW_ROWS = 64  # up to this average per expert, a tile has this many rows


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    resident: int  # programs per multiprocessor


# Keys: (whether the accelerator loads W, rows of a tile).
CONFIGS = {
    (True, 128): Config(128, 256, 64, 8, 3, 1),
    (True, 64): Config(64, 128, 64, 4, 4, 2),
    (False, 128): Config(128, 128, 32, 8, 4, 2),
    (False, 64): Config(64, 128, 32, 4, 4, 2),
}
# For cases that need more registers: drop(z Bᵀ), which has separate accumulators, and many ranks
# that cannot be loaded in wide accesses.
NARROW = {
    (True, 128): Config(128, 128, 64, 8, 4, 1),
    (True, 64): Config(64, 64, 64, 4, 4, 2),
    (False, 128): Config(128, 64, 32, 8, 4, 2),
    (False, 64): Config(64, 64, 32, 4, 4, 2),
}
# For float32, which is computed without tensor cores, and for sizes without wide accesses.
SMALL = Config(64, 64, 16, 8, 3, 2)


@triton.jit
def _load_w(
    w, expert, k, n, N, K, w_expert, w_row, w_col,
    W_IS_KN: tl.constexpr, W_TMA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile [BLOCK_K, BLOCK_N] of Wₑᵀ."""
    if W_TMA:
        if W_IS_KN:
            tile = tl.reshape(w.load([expert, k, n]), [BLOCK_K, BLOCK_N])
        else:
            tile = tl.reshape(w.load([expert, n, k]), [BLOCK_N, BLOCK_K]).T
    else:
        base = w + expert.to(tl.int64) * w_expert
        depth, col = k + tl.arange(0, BLOCK_K), (n + tl.arange(0, BLOCK_N)).to(tl.int64)
        where = col[None, :] * w_row + depth.to(tl.int64)[:, None] * w_col
        tile = tl.load(base + where, mask=(col < N)[None, :] & (depth < K)[:, None], other=0.0)
    return tile


@triton.jit(do_not_specialize=["E", "threshold"])
def grouped_gemm_kernel(
    w,
    a,
    rows,
    out,
    bias,
    z,
    B,
    z0,
    B0,
    seed,
    tiles,
    firsts,
    E,
    N,
    K,
    r,
    a_stride,
    w_expert,
    w_row,
    w_col,
    b_expert,
    b_row,
    b_col,
    b0_expert,
    b0_row,
    b0_col,
    scale,
    scale0,
    threshold,
    keep_scale,
    W_IS_KN: tl.constexpr,
    W_TMA: tl.constexpr,
    A_TMA: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RANK: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANKS: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    EARLY: tl.constexpr,
):
    r = aligned(r, RANK_UNIT)
    rows_of_tiles, cols_of_tiles = tl.load(firsts + E + 1), tl.cdiv(N, BLOCK_N)
    group = GROUP_M * cols_of_tiles
    count = rows_of_tiles * cols_of_tiles
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0)):
        # Tiles are ordered in groups of GROUP_M rows of tiles, which reuse W in the L2 cache.
        first = index // group * GROUP_M
        height = min(rows_of_tiles - first, GROUP_M)
        n = index % group // height * BLOCK_N
        expert, begin, end = load_tile(tiles, first + index % group % height)
        # Rows of no expert get zeros; nothing is read for them.
        owned = expert < E
        depth, cols, limit = tl.where(owned, K, 0), tl.where(owned, N, 0), tl.where(owned, end, 0)
        row = begin + tl.arange(0, BLOCK_M)
        inside = row < limit
        row64 = row.to(tl.int64)
        col = n + tl.arange(0, BLOCK_N)
        rank = tl.arange(0, BLOCK_R)
        if HAS_RANK:
            B_own = B + expert.to(tl.int64) * b_expert
            if HAS_START:
                B0_own = B0 + expert.to(tl.int64) * b0_expert
            if EARLY:
                b_tile = load_Bt(B_own, rank, col, cols, r, b_row, b_col)
                z_tile = load_z(z, row64, rank, limit, r)
                if HAS_START:
                    b0_tile = load_Bt(B0_own, rank, col, cols, r, b0_row, b0_col)
                    z0_tile = load_z(z0, row64, rank, limit, r)
        if not A_TMA:
            source = tl.load(rows + row64, mask=inside, other=0) if HAS_ROWS else row64
            a_rows = a + source[:, None] * a_stride
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, depth, BLOCK_K):
            if A_TMA:
                a_tile = a.load([begin, k])
            else:
                at = k + tl.arange(0, BLOCK_K)
                mask = inside[:, None] & (at < K)[None, :]
                a_tile = tl.load(a_rows + at[None, :], mask=mask, other=0.0)
            w_tile = _load_w(
                w, expert, k, n, N, K, w_expert, w_row, w_col, W_IS_KN, W_TMA, BLOCK_N, BLOCK_K
            )
            acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
        if HAS_RANK:
            term = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) if HAS_DROPOUT else acc
            if EARLY:
                left, right = rank_operands(z_tile, b_tile, row, limit, scale)
                if HAS_START:
                    left0, right0 = rank_operands(z0_tile, b0_tile, row, limit, scale0)
                    if not HAS_DROPOUT:
                        # A single product with the ranks of both interleaved: for two products,
                        # Triton 3.6 makes an empty kernel for sm_100.
                        left = tl.reshape(tl.join(left, left0), [BLOCK_M, 2 * BLOCK_R])
                        right = tl.permute(tl.join(right, right0), [0, 2, 1])
                        right = tl.reshape(right, [2 * BLOCK_R, BLOCK_N])
                term = tl.dot(left, right, term, input_precision="ieee")
            else:
                term = add_rank_term(
                    term, z, B_own, row64, col, limit, cols, r, b_row, b_col, scale, RANKS, BLOCK_R
                )
            if HAS_DROPOUT:
                seed_value = tl.load(seed)
                acc += drop(term, seed_value, row64, n, threshold, keep_scale, BLOCK_N)
            else:
                acc = term
            if HAS_START:
                if not EARLY:
                    acc = add_rank_term(
                        acc, z0, B0_own, row64, col, limit, cols, r, b0_row, b0_col, scale0,
                        RANKS, BLOCK_R,
                    )  # fmt: skip
                elif HAS_DROPOUT:
                    acc = tl.dot(left0, right0, acc, input_precision="ieee")
        if HAS_BIAS:
            own = bias + expert.to(tl.int64) * N + col
            acc += tl.load(own, mask=col < cols, other=0.0).to(tl.float32)[None, :]
        where = out + row64[:, None] * N + col[None, :]
        mask = (row < end)[:, None] & (col < N)[None, :]
        tl.store(where, acc.to(out.dtype.element_ty), mask=mask)


def tile_rows(dtype: torch.dtype, size: int, E: int, N: int, K: int) -> int:
    """The rows of a tile, for a product with `size` rows and weight [E, N, K]."""
    return 64 if size <= FEW_ROWS * E or _is_small(dtype, N, K) else 128


def _is_small(dtype: torch.dtype, N: int, K: int) -> bool:
    return dtype == torch.float32 or N % 8 > 0 or K % 8 > 0


def fits(tensor: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can load it: 16-bit, contiguous in the last dimension,
    and address and other strides multiples of 16 bytes.
    """
    *strides, last = tensor.stride()
    return (
        last == 1
        and all(stride > 0 and stride % 8 == 0 for stride in strides)
        and tensor.element_size() == 2
        and tensor.data_ptr() % 16 == 0
        and max(tensor.shape) < 2**31
    )


def gemm(
    multiprocessors: int,
    has_tma: bool,
    a: torch.Tensor,
    rows: torch.Tensor | None,
    weight: torch.Tensor,
    tiles: Schedule,
    size: int,
    z: torch.Tensor | None,
    B: torch.Tensor | None,
    scale: float,
    bias: torch.Tensor | None = None,
    z0: torch.Tensor | None = None,
    B0: torch.Tensor | None = None,
    scale0: float = 0.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product [size, N] of a[rows] with weight [E, N, K] of any strides; zero in rows of no
    expert.

    Without `rows`, a is [size, K]. The rows of a are contiguous. z and z0 [size, r] and bias [E, N]
    are contiguous; B and B0 [E, N, r] have any strides. `has_tma`: the GPU is Hopper or later.
    """
    E, N, K = weight.shape
    is_kn = weight.stride(2) != 1
    matrix = weight.transpose(1, 2) if is_kn else weight
    w_tma = has_tma and fits(matrix)
    a_tma = w_tma and rows is None and fits(a)
    out = torch.empty((size, N), dtype=a.dtype, device=a.device)
    absent = out.view(1, size, N)
    B = absent if B is None else B
    start = B if B0 is None else B0
    r = 0 if z is None else z.shape[1]
    launch = _plan(
        multiprocessors,
        (E, N, K, r, a.stride(0), *weight.stride(), *B.stride(), *start.stride()),
        (tiles.limit, tiles.rows),
        _is_small(a.dtype, N, K),
        is_kn and w_tma,
        (w_tma, a_tma),
        rows is not None,
        bias is not None,
        z0 is not None,
        dropout > 0 and r > 0,
    )
    launch(
        (
            matrix,
            a,
            out if rows is None else rows,
            out,
            out if bias is None else bias,
            out if z is None else z,
            B,
            out if z0 is None else z0,
            start,
            out if seed is None else seed,
            tiles.tiles,
            tiles.firsts,
        ),
        (scale, scale0, *mask_arguments(dropout)),
    )
    return out


def _constants(r: int, has_start: bool) -> dict[str, int]:
    """The constants for the rank terms."""
    early = 0 < r <= (MOST_EARLY // 2 if has_start else MOST_EARLY)
    block_r = rank_block(max(r, 1), MOST_EARLY if early else 16)
    return {
        "BLOCK_R": block_r,
        "RANKS": cdiv(r, block_r) * block_r,
        "RANK_UNIT": rank_unit(r) if r else 16,
        "EARLY": early,
    }


@functools.lru_cache(maxsize=1024)
def _plan(
    multiprocessors: int,
    sizes: tuple[int, ...],
    tiles: tuple[int, int],
    small: bool,
    w_is_kn: bool,
    tma: tuple[bool, bool],
    has_rows: bool,
    has_bias: bool,
    has_start: bool,
    has_dropout: bool,
) -> Launch:
    (_, N, _, r), (limit, rows), (w_tma, a_tma) = sizes[:4], tiles, tma
    constants = _constants(r, has_start)
    narrow = has_dropout or (r % 8 and not constants["EARLY"])
    config = SMALL if small else (NARROW if narrow else CONFIGS)[w_tma, rows]
    block_m, block_n, block_k, warps, stages, resident = config
    blocks = [[1, block_k, block_n] if w_is_kn else [1, block_n, block_k]] if w_tma else []
    blocks += [[block_m, block_k]] if a_tma else []
    return Launch(
        grouped_gemm_kernel,
        (min(resident * multiprocessors, limit * cdiv(N, block_n)),),
        sizes,
        blocks,
        W_IS_KN=w_is_kn,
        W_TMA=w_tma,
        A_TMA=a_tma,
        HAS_ROWS=has_rows,
        HAS_BIAS=has_bias,
        HAS_RANK=r > 0,
        HAS_START=has_start,
        HAS_DROPOUT=has_dropout,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_M=GROUP_M,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
        **constants,
    )
