"""Divides a file into blocks, each of which is read, edited and written as a whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from ..._utils.safetensors import DTYPES, Entry, Layout

BLOCK = 16 << 20  # bytes: larger copied tensors are divided, small tensors are joined
_PAGE = 4096
_DROPPED = Entry("", "", (), 0, 0)  # the target of a tensor that the target file does not have


@dataclass(frozen=True)
class Piece:
    """A tensor, or a part of a tensor that is only copied, in the source and in the target; or
    `tensor[index]` of an edited tensor that is divided into slices.
    """

    source: Entry
    target: Entry
    edited: bool
    index: int | None = None

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.source.name

    @property
    def cast(self) -> bool:
        return self.source.dtype != self.target.dtype


@dataclass(frozen=True)
class Block:
    """Pieces that are adjacent in the source and in the target."""

    pieces: tuple[Piece, ...]

    @cached_property
    def source(self) -> tuple[int, int]:
        """The range of the block's bytes in the source's data."""
        return self.pieces[0].source.begin, self.pieces[-1].source.end

    @cached_property
    def target(self) -> tuple[int, int]:
        """The range of the block's bytes in the target's data."""
        return self.pieces[0].target.begin, self.pieces[-1].target.end

    @cached_property
    def cast(self) -> bool:
        """Whether a dtype changes, so that the new bytes need memory of their own."""
        return any(piece.cast for piece in self.pieces)

    @property
    def source_size(self) -> int:
        return self.source[1] - self.source[0]

    @property
    def target_size(self) -> int:
        return self.target[1] - self.target[0]

    def places(self, source_offset: int, target_offset: int) -> tuple[int, int, int]:
        """The offsets of the old and of the new bytes in a buffer, and the size of the buffer. The
        two offsets are equal unless a dtype changes. `..._offset`: where the data begins in a file.
        """
        old = _skew(source_offset + self.source[0])
        end = old + self.source_size
        if not self.cast:
            return old, old, end
        new = -(-end // _PAGE) * _PAGE + _skew(target_offset + self.target[0])
        return old, new, new + self.target_size


def _skew(position: int) -> int:
    """The offset within a memory page: the same as in the file, because copies between different
    offsets are a third slower; 0 if the numbers would not be aligned there.
    """
    return position % _PAGE if position % 8 == 0 else 0


def divide(
    source: Layout,
    target: Layout,
    edited: Collection[str],
    only_edited: bool = False,
    sliced: Collection[str] = (),
) -> list[Block]:
    """The blocks of a file. An edited tensor is not divided, unless it is in `sliced`: then each
    slice of its first dimension is a piece. Other tensors are copied in parts.

    `target` has all or some of the tensors of `source`, in the same order. `only_edited`: tensors
    that are not edited are left out.
    """
    blocks: list[Block] = []
    pieces: list[Piece] = []
    size = 0
    for piece in _pieces(source, target, edited, sliced):
        wanted = (piece.edited or not only_edited) and piece.target is not _DROPPED
        length = max(piece.source.end - piece.source.begin, piece.target.end - piece.target.begin)
        if pieces and (not wanted or size + length > BLOCK):
            blocks.append(Block(tuple(pieces)))
            pieces, size = [], 0
        if wanted:
            pieces.append(piece)
            size += length
    if pieces:
        blocks.append(Block(tuple(pieces)))
    return blocks


def _pieces(
    source: Layout, target: Layout, edited: Collection[str], sliced: Collection[str]
) -> Iterator[Piece]:
    targets = {entry.name: entry for entry in target.entries}
    for old in source.entries:
        new = targets.get(old.name, _DROPPED)
        if old.name in edited and old.name in sliced and new is not _DROPPED:
            yield from _slices(old, new)
        elif old.name in edited or new is _DROPPED:
            yield Piece(old, new, old.name in edited)
        elif old.dtype == new.dtype:
            offset = new.begin - old.begin
            for begin in range(old.begin, max(old.end, old.begin + 1), BLOCK):
                end = min(begin + BLOCK, old.end)
                yield Piece(
                    Entry(old.name, old.dtype, (end - begin,), begin, end),
                    Entry(old.name, old.dtype, (end - begin,), begin + offset, end + offset),
                    False,
                )
        else:
            yield from _cast_pieces(old, new)


def _slices(old: Entry, new: Entry) -> Iterator[Piece]:
    """The slices of an edited tensor."""
    for index in range(old.shape[0]):
        yield Piece(old.slice(index), new.slice(index), True, index)


def _cast_pieces(old: Entry, new: Entry) -> Iterator[Piece]:
    """The parts of a tensor that is cast; no part ends inside a number."""
    sizes = DTYPES[old.dtype].itemsize, DTYPES[new.dtype].itemsize
    step = BLOCK // max(sizes)
    for first in range(0, max(old.numel, 1), step):
        last = min(first + step, old.numel)
        source, target = (
            Entry(e.name, e.dtype, (last - first,), e.begin + first * k, e.begin + last * k)
            for e, k in zip((old, new), sizes, strict=True)
        )
        yield Piece(source, target, False)
