"""out = a Wᵀ (or a W) + bias + scale · z Bᵀ + scale₀ · z₀ B₀ᵀ in one kernel, for Hopper and later.

A persistent GEMM that loads tiles with the tensor memory accelerator. The rank terms are added to
the same float32 accumulator after the K loop, because before it they would occupy shared memory
that the pipeline needs. Up to rank 32 their operands are loaded before the loop, into registers.
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
from .rank import add_rank_term, load_Bt, load_z, rank_block, rank_operands, rank_unit
from .shrink import shrink_parts

GROUP_M = 8
LARGEST_RANK = 128  # above it, the rank term takes long, and overlaps with nothing
MOST_EARLY = 32  # ranks whose operands are loaded before the K loop
# In flattened loops of Triton 3.6, each wgmma waits for the previous one (ptxas C7515).
FLATTENS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


class Config(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    resident: int  # programs per multiprocessor
    early: bool  # z and B are loaded before the K loop, up to rank MOST_EARLY
    flat: bool  # one pipeline over all tiles: the next tile's loads begin before a tile ends
    waits: bool = False  # starts together with the kernel that computes z, and loads z last


CONFIGS = {
    "fused": Config(128, 256, 64, 8, 3, 1, early=True, flat=False),
    "fused flat": Config(128, 256, 64, 8, 3, 1, early=True, flat=True),
    # Two programs, so that the rank term of one overlaps with the K loop of the other.
    "fused pair": Config(128, 128, 64, 4, 3, 2, early=False, flat=False),
}
OVERLAPPED = Config(128, 256, 64, 8, 3, 1, early=True, flat=False, waits=True)


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
    EARLY: tl.constexpr,
    FLAT: tl.constexpr,
    LATE_Z: tl.constexpr,
    WAITS: tl.constexpr,
):
    r = aligned(r, RANK_UNIT)
    rows_of_tiles, cols_of_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = GROUP_M * cols_of_tiles
    tiles = rows_of_tiles * cols_of_tiles
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLAT):
        # Tiles are ordered in groups of GROUP_M rows of tiles, which reuse W in the L2 cache.
        first = tile // group * GROUP_M
        height = min(rows_of_tiles - first, GROUP_M)
        m = (first + tile % group % height) * BLOCK_M
        n = tile % group // height * BLOCK_N
        row = m + tl.arange(0, BLOCK_M)
        col = n + tl.arange(0, BLOCK_N)
        row64 = row.to(tl.int64)
        rank = tl.arange(0, BLOCK_R)
        if EARLY:
            b_tile = load_Bt(B, rank, col, N, r, b_row, b_col)
            if not LATE_Z:
                z_tile = load_z(z, row64, rank, M, r)
            if HAS_START:
                b0_tile = load_Bt(B0, rank, col, N, r, b0_row, b0_col)
                z0_tile = load_z(z0, row64, rank, M, r)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            a_tile = a.load([m, k])
            if W_IS_KN:
                acc = tl.dot(a_tile, w.load([k, n]), acc)
            else:
                acc = tl.dot(a_tile, w.load([n, k]).T, acc)
        if WAITS:
            tl.extra.cuda.gdc_wait()
        if LATE_Z:
            z_tile = load_z(z, row64, rank, M, r)
        if EARLY:
            left, right = rank_operands(z_tile, b_tile, row, M, scale)
            if HAS_START:  # interleave the ranks of both, for a single product
                left0, right0 = rank_operands(z0_tile, b0_tile, row, M, scale0)
                left = tl.reshape(tl.join(left, left0), [BLOCK_M, 2 * BLOCK_R])
                right = tl.permute(tl.join(right, right0), [0, 2, 1])
                right = tl.reshape(right, [2 * BLOCK_R, BLOCK_N])
            acc = tl.dot(left, right, acc)
        else:
            acc = add_rank_term(acc, z, B, row64, col, M, N, r, b_row, b_col, scale, RANKS, BLOCK_R)
            if HAS_START:
                acc = add_rank_term(
                    acc, z0, B0, row64, col, M, N, r, b0_row, b0_col, scale0, RANKS, BLOCK_R
                )
        if HAS_BIAS:
            acc += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
        # Stored in halves, because a whole tile would need the shared memory of a pipeline stage.
        halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
        left_half, right_half = tl.split(halves)
        out.store([m, n], left_half.to(out.dtype))
        out.store([m, n + BLOCK_N // 2], right_half.to(out.dtype))


@functools.cache
def offered(r: int, start: bool, flat: bool = True) -> tuple[str, ...]:
    """The configurations for rank r (2r with initial factors) that compile without register spills
    or waiting wgmma instructions.

    `flat` is for Hopper; on Blackwell, Triton up to 3.9 fails to flatten the loops.
    """
    if r % 8 or (2 * r if start else r) > LARGEST_RANK:
        return ()
    if start or (not flat and r > MOST_EARLY):
        return ("fused",)
    flat = flat and FLATTENS and r <= 16  # above 16, the pipelined B exceeds shared memory
    return tuple(name for name, config in CONFIGS.items() if flat or not config.flat)


def overlaps(r: int, has_dropout: bool) -> bool:
    """Whether both kernels of `overlapped` fit in the registers at the same time."""
    return r % 8 == 0 and 0 < r <= (16 if has_dropout else MOST_EARLY)


def fits(matrix: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can load it: 16-bit, rows at multiples of 16 bytes."""
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


def _constants(config: Config, r: int, has_start: bool) -> dict[str, int]:
    """The constants of `gemm_kernel`."""
    early = config.early and r <= (MOST_EARLY // 2 if has_start else MOST_EARLY)
    # One block if the operands are loaded early; else 16 ranks at a time where more would spill.
    block_r = rank_block(r, 16 if not early and (has_start or r % 16) else MOST_EARLY)
    ranks = cdiv(r, block_r) * block_r
    if has_start and not early:
        # A loop of one iteration is unrolled, and then the accumulators do not fit on sm_100.
        ranks = max(ranks, 2 * block_r)
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": block_r,
        "RANKS": ranks,
        "RANK_UNIT": rank_unit(r),
        "GROUP_M": GROUP_M,
        "EARLY": early,
        "FLAT": config.flat,
        "LATE_Z": config.waits,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }


def gemm(
    config: str | Config,
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
    waits: bool = False,
) -> torch.Tensor:
    """a [M, K] times weight [N, K] transposed, or weight [K, N], and the rank terms.

    z and z0 [M, r] are contiguous; B and B0 [N, r] have any strides. With `waits`, the kernel that
    computes z lets this one start early; all other inputs must be ready by then.
    """
    (M, K), (N, r) = a.shape, B.shape
    out = torch.empty((M, N), dtype=a.dtype, device=a.device)
    start = B if B0 is None else B0
    launch = _plan(
        CONFIGS.get(config, config),
        multiprocessors,
        w_is_kn,
        (M, N, K, r, *B.stride(), *start.stride()),
        bias is not None,
        z0 is not None,
        waits,
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
    config: Config,
    multiprocessors: int,
    w_is_kn: bool,
    sizes: tuple[int, ...],
    has_bias: bool,
    has_start: bool,
    waits: bool,
) -> Launch:
    block_m, block_n, block_k, *_ = config
    M, N, _, r = sizes[:4]
    w_block = [block_k, block_n] if w_is_kn else [block_n, block_k]
    tiles = cdiv(M, block_m) * cdiv(N, block_n)
    return Launch(
        gemm_kernel,
        (min(config.resident * multiprocessors, tiles),),
        sizes,
        ([block_m, block_k], w_block, [block_m, block_n // 2]),
        W_IS_KN=w_is_kn,
        HAS_BIAS=has_bias,
        HAS_START=has_start,
        WAITS=waits,
        launch_pdl=waits,
        enable_fp_fusion=True,
        **_constants(config, r, has_start),
    )


def overlapped(
    multiprocessors: int,
    x: torch.Tensor,
    weight: torch.Tensor,
    w_is_kn: bool,
    A: torch.Tensor,
    B: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    dropout: float,
    seed: torch.Tensor | None,
    overlap: bool,
    col_offset: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] and z = drop(x) Aᵀ [M, r], where `overlaps` is true.

    The product with W runs at the same time as the kernel that computes z, in the shared memory
    that kernel leaves free, and waits for it after the first tile's K loop. `overlap` needs Hopper
    or later.
    """
    options = {"parts": 1, "overlap": overlap, "beside": True, "col_offset": col_offset}
    z = shrink_parts(x, A, None, dropout, seed, **options)[0][0]
    y = gemm(
        OVERLAPPED, multiprocessors, x, weight, w_is_kn, z, B, scale, bias, waits=overlap
    )  # fmt: skip
    return y, z
