"""Which rows each program of a grouped kernel handles, found on the device from `ends`.

The rows of every expert, and those after the last expert, are divided into tiles of at most `rows`
rows. A table on the device lists the tiles in ascending order. The host knows only an upper bound
on their number, so it never waits for the device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..integers import cdiv, next_power_of_2
from ..launcher import Launch

BLOCK = 64
CHECKED = 1024
# Wrong indices end the program, as in PyTorch's kernels, which do not wait for the device either.
ASSERTS = {"debug": True, "sanitize_overflow": False}
FIELDS = 4  # of a tile: expert, first row, end of its rows, unused


class Schedule(NamedTuple):
    """`tiles` int32 [limit, FIELDS]; `firsts` int32 [E + 2]: the index of each expert's first tile
    and of the first tile after the experts, and the number of tiles. Tiles of "expert" E have the
    rows that belong to no expert.
    """

    tiles: torch.Tensor
    firsts: torch.Tensor
    rows: int  # the most in a tile
    limit: int  # the most tiles


@triton.jit(do_not_specialize=["S", "T", "E", "limit"])
def schedule_kernel(
    ends,
    rows,
    tiles,
    firsts,
    S,
    T,
    E,
    limit,
    HAS_ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECKED: tl.constexpr,
):
    expert = tl.program_id(0)
    if HAS_ROWS and expert > E:  # the programs after the experts' programs
        at = (expert - E - 1) * CHECKED + tl.arange(0, CHECKED)
        row = tl.load(rows + at, mask=at < S, other=0)
        tl.device_assert((row >= 0) & (row < T), "rows must be row numbers of x")
        return
    k = tl.arange(0, SLOTS)
    begin = tl.load(ends + k - 1, mask=(k > 0) & (k <= E), other=0)
    end = tl.load(ends + k, mask=k < E, other=S)
    right = (begin <= end) & (end <= S)
    tl.device_assert(right | (k > E), "ends must not decrease, nor exceed the number of rows")
    # The interpreter has no assertions, so indices are clamped to the tensors.
    begin, end = tl.maximum(tl.minimum(begin, S), 0), tl.minimum(end, S)
    count = tl.where(k <= E, tl.maximum(end - begin + ROWS - 1, 0) // ROWS, 0)
    first = tl.sum(tl.where(k < expert, count, 0), 0)
    own = k == expert
    own_count = tl.sum(tl.where(own, count, 0), 0)
    own_begin = tl.sum(tl.where(own, begin, 0), 0)
    own_end = tl.sum(tl.where(own, end, 0), 0)
    for index in range(0, own_count, BLOCK):
        at = index + tl.arange(0, BLOCK)
        mask = (at < own_count) & (first + at < limit)
        tile = tiles + (first + at) * 4
        row = own_begin + at * ROWS
        tl.store(tile, at * 0 + expert, mask=mask)
        tl.store(tile + 1, row, mask=mask)
        tl.store(tile + 2, tl.minimum(row + ROWS, own_end), mask=mask)
    tl.store(firsts + expert, tl.minimum(first, limit))
    if expert == E:
        tl.store(firsts + E + 1, tl.minimum(first + own_count, limit))


@triton.jit
def load_tile(tiles, index):
    """(expert, first row, end of the rows) of a tile."""
    tile = tiles + index * 4
    return tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)


def schedule(
    ends: torch.Tensor,
    size: int,
    tile_rows: int,
    rows: torch.Tensor | None = None,
    tokens: int = 0,
) -> Schedule:
    """The tiles of a product with `size` rows, of at most `tile_rows` rows each.

    `rows`, if given, are checked to be numbers below `tokens`.
    """
    E = ends.shape[0]
    limit = size // tile_rows + E + 1
    tiles = torch.empty((limit, FIELDS), dtype=torch.int32, device=ends.device)
    firsts = torch.empty(E + 2, dtype=torch.int32, device=ends.device)
    launch = _plan((size, tokens, E, limit), tile_rows, rows is not None)
    launch((ends, ends if rows is None else rows, tiles, firsts))
    return Schedule(tiles, firsts, tile_rows, limit)


@functools.lru_cache(maxsize=1024)
def _plan(sizes: tuple[int, int, int, int], tile_rows: int, has_rows: bool) -> Launch:
    size, _, E, _ = sizes
    return Launch(
        schedule_kernel,
        (E + 1 + (cdiv(size, CHECKED) if has_rows else 0),),
        sizes,
        HAS_ROWS=has_rows,
        SLOTS=next_power_of_2(E + 1),
        ROWS=tile_rows,
        BLOCK=BLOCK,
        CHECKED=CHECKED,
        num_warps=1 if E < 64 else 4,
        enable_fp_fusion=True,
        **ASSERTS,
    )
