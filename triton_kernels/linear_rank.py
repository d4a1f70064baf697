"""What the layer's kernels share: how a rank is cut into tiles, and sums that come in parts."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from .integers import cdiv, next_power_of_2
from .launcher import Launch

ENOUGH_PROGRAMS = 128  # an H100, H200 or A100 has 108 to 132 multiprocessors


def rank_unit(r: int) -> int:
    """A factor of r that the compiler can count on: what one access may span."""
    return math.gcd(r, 16)


def rank_block(r: int, largest: int) -> int:
    """The rank that a program is compiled for: a power of two that tl.dot takes."""
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


@triton.jit(do_not_specialize=["length", "parts"])
def reduce_kernel(parts_of, out, parts, length, scale, BLOCK: tl.constexpr):
    """out = scale · the sum of `parts` arrays of `length`, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < length
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        total += tl.load(parts_of + part * length.to(tl.int64) + at, mask=mask, other=0.0)
    tl.store(out + at, (scale * total).to(out.dtype.element_ty), mask=mask)


def reduce(parts: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """`scale` · the sum of parts [S, ...] float32 over S, in order, as `dtype`."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    length = out.numel()
    if length:
        _reduction(parts.shape[0], length)((parts, out), (scale,))
    return out


@functools.lru_cache(maxsize=1024)
def _reduction(parts: int, length: int) -> Launch:
    grid = (cdiv(length, 512),)
    return Launch(reduce_kernel, grid, (parts, length), BLOCK=512, enable_fp_fusion=True)
