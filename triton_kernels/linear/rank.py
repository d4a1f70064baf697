"""Shared by the layer's kernels: how a rank is divided into blocks, and the addition of parts."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from ..integers import cdiv, next_power_of_2
from ..jobs import aligned
from ..launcher import Launch

REDUCE_BLOCK = 512
ENOUGH_PROGRAMS = 128  # an H100, H200 or A100 has 108 to 132 multiprocessors


def rank_unit(r: int) -> int:
    """The largest factor of r up to 16, which the compiler may use for wide accesses."""
    return math.gcd(r, 16)


def rank_block(r: int, largest: int) -> int:
    """The number of ranks that a program handles at a time: a power of two allowed by tl.dot."""
    return min(max(16, next_power_of_2(r)), largest)


@triton.jit
def load_z(z, row, rank, M, r):
    """The tile rows × ranks of z [M, r], whose rows are contiguous."""
    mask = (row < M)[:, None] & (rank < r)[None, :]
    return tl.load(z + row[:, None] * r + rank[None, :], mask=mask, other=0.0)


@triton.jit
def load_Bt(B, rank, col, N, r, b_row, b_col):
    """The tile ranks × columns of Bᵀ, for B [N, r] of any strides."""
    mask = (rank < r)[:, None] & (col < N)[None, :]
    return tl.load(B + col[None, :] * b_row + rank[:, None] * b_col, mask=mask, other=0.0)


@triton.jit
def thin_product(left, right, acc, TRANSPOSED: tl.constexpr):
    """acc + left right, or (left right)ᵀ added to a transposed acc."""
    if TRANSPOSED:
        return tl.dot(tl.trans(right), tl.trans(left), acc, input_precision="ieee")
    else:
        return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def rank_operands(z_tile, b_tile, row, M, scale):
    """The operands of a dot from loaded tiles of z and Bᵀ; B is scaled before it is rounded.

    Called after the K loop. The mask keeps z in registers until then: Triton stores a tile that a
    product uses unchanged in shared memory right after loading it, and the K loop's first loads
    would wait for that.
    """
    left = tl.where((row < M)[:, None], z_tile, 0.0)
    return left, (scale * b_tile.to(tl.float32)).to(left.dtype)


@triton.jit
def add_rank_term(
    acc, z, B, row, col, M, N, r, b_row, b_col, scale, RANKS: tl.constexpr, BLOCK_R: tl.constexpr
):
    """acc + z (scale · B)ᵀ, a block of ranks at a time."""
    for first in tl.range(0, RANKS, BLOCK_R, num_stages=1):
        rank = first + tl.arange(0, BLOCK_R)
        left = load_z(z, row, rank, M, r)
        right = load_Bt(B, rank, col, N, r, b_row, b_col)
        right = (scale * right.to(tl.float32)).to(left.dtype)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    return acc


@triton.jit
def _reduce_block(
    parts_of, out, parts, length, scale, program, BLOCK: tl.constexpr, UNIT: tl.constexpr
):
    length = aligned(length, UNIT)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < length
    total = tl.zeros([BLOCK], tl.float32)
    # Unrolled, so that 4 loads are in flight; else each would wait for the previous addition.
    for part in tl.range(0, parts, loop_unroll_factor=4):
        total += tl.load(parts_of + part * length.to(tl.int64) + at, mask=mask, other=0.0)
    tl.store(out + at, (scale * total).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "parts"])
def reduce_kernel(parts_of, out, parts, length, scale, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """out = scale · the sum of `parts` arrays of `length`, added in order."""
    _reduce_block(parts_of, out, parts, length, scale, tl.program_id(0), BLOCK, UNIT)


@triton.jit(
    do_not_specialize=[
        *("parts_a", "length_a", "blocks_a", "parts_b", "length_b", "blocks_b"),
        *("parts_c", "length_c"),
    ]
)
def reduce_three_kernel(
    parts_of_a, out_a, parts_of_b, out_b, parts_of_c, out_c,
    parts_a, length_a, blocks_a, parts_b, length_b, blocks_b, parts_c, length_c,
    scale_a, scale_b, scale_c,
    BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Three sums like `reduce_kernel`'s: the first programs compute a, the next b, the last c."""
    program = tl.program_id(0)
    if program < blocks_a:
        _reduce_block(parts_of_a, out_a, parts_a, length_a, scale_a, program, BLOCK, UNIT)
    elif program < blocks_a + blocks_b:
        _reduce_block(
            parts_of_b, out_b, parts_b, length_b, scale_b, program - blocks_a, BLOCK, UNIT
        )
    else:
        program -= blocks_a + blocks_b
        _reduce_block(parts_of_c, out_c, parts_c, length_c, scale_c, program, BLOCK, UNIT)


def reduce(parts: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """`scale` · the sum of parts [S, ...] in float32 over S, added in order, as `dtype`."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    length = out.numel()
    if length:
        _reduction(parts.shape[0], length)((parts, out), (scale,))
    return out


@functools.lru_cache(maxsize=1024)
def _reduction(parts: int, length: int) -> Launch:
    return Launch(
        reduce_kernel,
        (cdiv(length, REDUCE_BLOCK),),
        (parts, length),
        BLOCK=REDUCE_BLOCK,
        UNIT=math.gcd(length, 4),
        enable_fp_fusion=True,
    )


def reduce_all(sums: list[tuple[torch.Tensor, torch.dtype, float]]) -> list[torch.Tensor]:
    """`reduce` of up to three (parts, dtype, scale), none of them empty, in one launch."""
    if len(sums) == 1:
        return [reduce(*sums[0])]
    outs = [torch.empty(p.shape[1:], dtype=dtype, device=p.device) for p, dtype, _ in sums]
    jobs = [*zip(sums, outs, strict=True)]
    jobs += [jobs[1]] * (3 - len(jobs))  # with two sums, no program reaches the third
    launch = _reductions(len(sums), *((parts.shape[0], out.numel()) for (parts, _, _), out in jobs))
    launch(
        [tensor for (parts, _, _), out in jobs for tensor in (parts, out)],
        [scale for (_, _, scale), _ in jobs],
    )
    return outs


@functools.lru_cache(maxsize=1024)
def _reductions(count: int, *sizes: tuple[int, int]) -> Launch:
    """The launch for `sizes`, (number of parts, length) of each of three sums."""
    (parts_a, a), (parts_b, b), (parts_c, c) = sizes
    blocks = [cdiv(length, REDUCE_BLOCK) for _, length in sizes]
    return Launch(
        reduce_three_kernel,
        (sum(blocks[:count]),),
        (parts_a, a, blocks[0], parts_b, b, blocks[1], parts_c, c),
        BLOCK=REDUCE_BLOCK,
        UNIT=math.gcd(4, a, b, c),
        enable_fp_fusion=True,
    )
