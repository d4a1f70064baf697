"""A file cut into blocks: what is read, worked on and written at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from .layout import DTYPES, Entry, Layout

BLOCK = 16 << 20  # a copy's pieces are of this size, and small tensors are put together up to it
_PAGE = 4096


@dataclass(frozen=True)
class Piece:
    """A tensor, or a stretch of one that is only copied, before and after."""

    source: Entry
    target: Entry
    edited: bool

    @property
    def cast(self) -> bool:
        """Whether its dtype changes."""
        return self.source.dtype != self.target.dtype


@dataclass(frozen=True)
class Block:
    """Pieces that follow each other in the source, and so in the target."""

    pieces: tuple[Piece, ...]

    @cached_property
    def source(self) -> tuple[int, int]:
        """Its bytes of the source's data."""
        return self.pieces[0].source.begin, self.pieces[-1].source.end

    @cached_property
    def target(self) -> tuple[int, int]:
        """Its bytes of the target's data."""
        return self.pieces[0].target.begin, self.pieces[-1].target.end

    @cached_property
    def cast(self) -> bool:
        """Whether a dtype changes: then the new bytes have a place of their own."""
        return any(piece.cast for piece in self.pieces)

    @property
    def source_size(self) -> int:
        """Bytes that are read."""
        return self.source[1] - self.source[0]

    @property
    def target_size(self) -> int:
        """Bytes that are written."""
        return self.target[1] - self.target[0]

    def places(self, source_start: int, target_start: int) -> tuple[int, int, int]:
        """Where in a buffer the old bytes and the new ones lie, and its size; the new ones in the
        place of the old ones, unless a dtype changes. `..._start`: where the data begins in a file.
        """
        old = _skew(source_start + self.source[0])
        end = old + self.source_size
        if not self.cast:
            return old, old, end
        new = -(-end // _PAGE) * _PAGE + _skew(target_start + self.target[0])
        return old, new, new + self.target_size


def _skew(position: int) -> int:
    """The offset in a page: as in the file, for the system's copies, which are a third slower if
    they are shifted; but 0 where no number would be aligned.
    """
    return position % _PAGE if position % 8 == 0 else 0


def cut(
    source: Layout, target: Layout, edited: Collection[str], only_edited: bool = False
) -> list[Block]:
    """The blocks of a file: an edited tensor is never divided, the others are copied in parts.

    `target` has the tensors of `source` in the same order. `only_edited`: the others are not even
    read.
    """
    blocks: list[Block] = []
    pieces: list[Piece] = []
    size = 0
    for piece in _pieces(source, target, edited):
        wanted = piece.edited or not only_edited
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


def _pieces(source: Layout, target: Layout, edited: Collection[str]) -> Iterator[Piece]:
    for old, new in zip(source.entries, target.entries, strict=True):
        if old.name in edited:
            yield Piece(old, new, True)
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


def _cast_pieces(old: Entry, new: Entry) -> Iterator[Piece]:
    """Stretches of whole numbers."""
    sizes = DTYPES[old.dtype].itemsize, DTYPES[new.dtype].itemsize
    step = BLOCK // max(sizes)
    for first in range(0, max(old.numel, 1), step):
        last = min(first + step, old.numel)
        parts = [
            Entry(e.name, e.dtype, (last - first,), e.begin + first * k, e.begin + last * k)
            for e, k in zip((old, new), sizes, strict=True)
        ]
        yield Piece(*parts, False)
