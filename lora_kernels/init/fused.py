"""The parts of a fused layer: blocks of rows of W that are separate projections, such as q, k and
v. Each part has its own A and B. Together they form one A, stacked, and one block-diagonal B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import as_integer
from .start import Start

Part = tuple[int, int]  # the first row and the row after the last
Parts = tuple[Part, ...]
Sizes = int | tuple[int, ...] | Parts
_FORMS = (
    "the number of equal parts (3), the rows of each part (4096, 1024, 1024), or the first row and "
    "the row after the last of each part that is adapted ((0, 768), (1536, 2304))"
)


def checked_sizes(value: Any, name: str) -> Sizes:
    """A value of `fused_parts`, with lists converted to tuples.

    Raises:
        ValueError: a number out of range, fewer than two parts, or rows in two parts.
        TypeError: it has none of the accepted forms.

    """
    if isinstance(value, Sequence) and not isinstance(value, str) and value:
        if all(isinstance(own, Sequence) and len(own) == 2 for own in value):
            return checked_ranges(value, name)
        if not any(isinstance(own, Sequence) for own in value):
            sizes = tuple(as_integer(own, name, minimum=1) for own in value)
            if len(sizes) < 2:
                raise ValueError(f"{name} has one part: give the rows of each of several parts")
            return sizes
    elif not isinstance(value, (str, bytes, Sequence)):
        return as_integer(value, name, minimum=2)
    raise TypeError(f"{name} must be {_FORMS}, got {value!r}")


def checked_ranges(value: Sequence[Sequence[Any]], name: str) -> Parts:
    """Parts, with lists converted to tuples.

    Raises:
        ValueError: they are not in ascending order, or have rows in common.
        TypeError: a row is not an integer.

    """
    parts = tuple((as_integer(begin, name, 0), as_integer(end, name, 1)) for begin, end in value)
    last = 0
    for begin, end in parts:
        if begin < last or end <= begin:
            raise ValueError(
                f"{name} has the rows {begin} to {end} after row {last}: give the parts in "
                "ascending order, the first row of each and the row after its last one"
            )
        last = end
    return parts


def parts_of(sizes: Sizes, rows: int) -> Parts:
    """The parts of a weight with `rows` rows.

    Raises:
        ValueError: the sizes do not fit the weight.

    """
    if isinstance(sizes, int):
        if rows % sizes:
            raise ValueError(
                f"its weight has {rows} rows, which are not {sizes} equal parts: give fused_parts "
                "the rows of each part"
            )
        sizes = (rows // sizes,) * sizes
    ranges, total = [], 0
    for own in sizes:
        part = (total, total + own) if isinstance(own, int) else own
        ranges.append(part)
        total = part[1]
    if isinstance(sizes[0], int) and total != rows:
        listed = " + ".join(map(str, sizes))
        raise ValueError(f"fused_parts gives it {listed} = {total} rows, its weight has {rows}")
    if total > rows:
        raise ValueError(
            f"fused_parts gives it parts up to row {total}, its weight has {rows} rows"
        )
    return tuple(ranges)


def check_parts(parts: Parts, lora_B: Tensor) -> None:
    """Raises ValueError unless B [out, r] can have blocks for these parts and is zero elsewhere."""
    rows, r = lora_B.shape
    if parts[-1][1] > rows or r % len(parts):
        raise ValueError(f"lora_B {[rows, r]} has no blocks for the parts {list(map(list, parts))}")
    if lora_B.count_nonzero() != within_blocks(lora_B, parts).count_nonzero():
        raise ValueError(
            f"lora_B is not zero outside the blocks of its parts {list(map(list, parts))}: it is "
            "of an adapter without fused_parts, or of one with other parts"
        )


def within_blocks(lora_B: Tensor, parts: Parts) -> Tensor:
    """B [rows, r] with zeros outside its blocks; no gradient flows to these. Block k of P has the
    rows of part k and the k-th group of r / P columns.
    """
    # A mask would take longer, and an infinite gradient times 0 would be NaN.
    rows, r = lora_B.shape
    found, last = [], 0
    for (begin, end), block in zip(parts, blocks(parts, r), strict=True):
        found += [lora_B.new_empty(begin - last, 0), lora_B[block]]
        last = end
    return torch.block_diag(*found, lora_B.new_empty(rows - last, 0))


def joined(starts: Sequence[Start], parts: Parts, rows: int) -> Start:
    """The starts of all parts as one start of the layer, without β: A [P·r, in] stacks the A of the
    parts, and B [rows, P·r] is block-diagonal.

    Raises:
        ValueError: a start has an R, or the starts are of different kinds.

    """
    if any(start.lora_R is not None for start in starts):
        raise ValueError(
            "the start trains an R, which would mix the parts of a fused layer: leave the layer "
            "out of fused_parts"
        )
    diags = [start.lora_diag for start in starts if start.lora_diag is not None]
    taken = [start.taken for start in starts if start.taken is not None]
    if len(diags) not in (0, len(starts)) or len(taken) not in (0, len(starts)):
        raise ValueError("the initializer returned starts of different kinds for the parts")

    def left(factors: Sequence[Tensor]) -> Tensor:
        r = sum(factor.shape[1] for factor in factors)
        whole = factors[0].new_zeros(rows, r)
        for block, factor in zip(blocks(parts, r), factors, strict=True):
            whole[block] = factor
        return whole

    return replace(
        starts[0],
        lora_A=torch.cat([start.lora_A for start in starts]),
        lora_B=left([start.lora_B for start in starts]),
        beta=None,
        weight_norm=None,
        lora_diag=torch.cat(diags) if diags else None,
        taken=(torch.cat([A for A, _ in taken]), left([B for _, B in taken])) if taken else None,
    )


def blocks(parts: Parts, r: int) -> list[tuple[slice, slice]]:
    """The rows and columns of each part's block of a B [..., r]."""
    own = r // len(parts)
    return [
        (slice(begin, end), slice(k * own, (k + 1) * own)) for k, (begin, end) in enumerate(parts)
    ]


def diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """The blocks [count, n, n] on the diagonal of a matrix [count · n, count · n]."""
    own = len(matrix) // count
    return matrix.view(count, own, count, own).diagonal(dim1=0, dim2=2).movedim(-1, 0)
