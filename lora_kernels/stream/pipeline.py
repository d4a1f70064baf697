"""Reading, computing and writing at the same time: a thread for each.

System calls and torch's operators release the interpreter lock, so that the three overlap. The
files are read and written with positioned calls into memory that is used again, not mapped: a map
counts as resident, and its page faults cost more than the copy.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .blocks import BLOCK, Block, Piece
from .buffers import Buffer, BufferPool
from .layout import DTYPES, Layout

AHEAD = 8 * BLOCK  # of memory beside the largest block, for what is being read and written
_CHUNK = 1 << 30  # Linux transfers at most 2 GiB a call


@dataclass(eq=False)
class Shard:
    """A file to rewrite. Without a `target` nothing is written: the tensors are only looked at."""

    source: Path
    source_layout: Layout
    target: Path | None
    target_layout: Layout
    blocks: Sequence[Block]

    @property
    def name(self) -> str:
        """The file's."""
        return self.source.name

    @property
    def size(self) -> int:
        """Bytes to read."""
        return sum(block.source_size for block in self.blocks)


@dataclass
class Actions:
    """What is done on the way.

    `edit(shard, name, weight)` changes an edited tensor in place, on the main thread, in the order
    of the file. `finished(shard)` is called once its target is written and has reached the disk, on
    another thread and in the order of the shards. `advanced(bytes)`, from any thread, says how many
    more of the source's bytes are dealt with.
    """

    edit: Callable[[Shard, str, Tensor], None]
    finished: Callable[[Shard], None] = field(default=lambda shard: None)
    advanced: Callable[[int], None] = field(default=lambda count: None)


def run(shards: Sequence[Shard], actions: Actions) -> None:
    """Rewrites the shards, one after the other.

    In memory are the largest block and `AHEAD` bytes more, beside what `edit` needs.

    Raises:
        ValueError, TypeError: what `edit` raises, with the tensor's name before it; a value that
            the new dtype cannot hold.
        OSError: a file cannot be read or written.

    """
    largest = max((block.memory for shard in shards for block in shard.blocks), default=0)
    pool = BufferPool(largest + AHEAD)
    with (
        ThreadPoolExecutor(1, "read") as reader,
        ThreadPoolExecutor(1, "write") as writer,
        ThreadPoolExecutor(1, "finish") as finisher,
    ):
        source, target = _Source(pool), _Target(pool, actions.advanced)
        waiting: deque[Future[None]] = deque()
        try:
            reads = deque(
                reader.submit(source.read, shard, block)
                for shard in shards
                for block in shard.blocks
            )
            for shard in shards:
                for block in shard.blocks:
                    buffer = reads.popleft().result()
                    for piece in block.pieces:
                        _work(piece, block, buffer, shard, actions)
                    waiting.append(writer.submit(target.write, shard, block, buffer))
                    while waiting and waiting[0].done():
                        waiting.popleft().result()
                written = writer.submit(target.close, shard)
                waiting.append(finisher.submit(_finish, written, shard, actions))
            while waiting:
                waiting.popleft().result()
        finally:
            pool.close()
            for pool_of_threads in (reader, writer, finisher):
                pool_of_threads.shutdown(cancel_futures=True)
            source.close()
            target.abandon()


def _finish(written: Future[int | None], shard: Shard, actions: Actions) -> None:
    """To the disk, while the next shard is under way."""
    descriptor = written.result()
    if descriptor is not None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    actions.finished(shard)


class _Source:
    """The file that is being read. Used by one thread."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._shard: Shard | None = None
        self._descriptor = -1

    def read(self, shard: Shard, block: Block) -> Buffer:
        """A buffer that starts with the block's bytes."""
        buffer = self._pool.take(block.memory)
        if shard is not self._shard:
            self.close()
            self._shard = shard
            self._descriptor = os.open(shard.source, os.O_RDONLY)
            _advise(self._descriptor, 0, 0, "POSIX_FADV_SEQUENTIAL")
        begin, end = block.source
        position = shard.source_layout.start + begin
        # The disk goes on with what comes next, while this is worked on and written.
        _advise(self._descriptor, position + end - begin, 4 * BLOCK, "POSIX_FADV_WILLNEED")
        done, size = 0, end - begin
        while done < size:
            view = buffer.view(done, min(size, done + _CHUNK))
            count = os.preadv(self._descriptor, [view], position + done)
            if count == 0:
                raise OSError(f"{shard.source} became shorter while it was read")
            done += count
        return buffer

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Target:
    """The file that is being written. Used by one thread."""

    def __init__(self, pool: BufferPool, advanced: Callable[[int], None]) -> None:
        self._pool = pool
        self._advanced = advanced
        self._shard: Shard | None = None
        self._descriptor: int | None = None

    def write(self, shard: Shard, block: Block, buffer: Buffer) -> None:
        """Writes the block, and gives its buffer back."""
        try:
            if shard.target is not None:
                self._open(shard)
                position = shard.target_layout.start + block.target[0]
                done, size = 0, block.target_size
                while done < size:
                    end = min(size, done + _CHUNK)
                    view = buffer.view(block.offset + done, block.offset + end)
                    done += os.pwritev(self._descriptor, [view], position + done)
        finally:
            self._pool.give_back(buffer)
        self._advanced(block.source_size)

    def close(self, shard: Shard) -> int | None:
        """The open file's descriptor, which is no more looked after here."""
        if shard.target is None:
            return None
        self._open(shard)  # there are files without a tensor
        descriptor, self._descriptor, self._shard = self._descriptor, None, None
        return descriptor

    def abandon(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self, shard: Shard) -> None:
        if shard is self._shard:
            return
        self._shard = shard
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._descriptor = os.open(shard.target, flags, 0o666)
        head, done = shard.target_layout.head(), 0
        while done < len(head):
            done += os.pwrite(self._descriptor, head[done:], done)


def _work(piece: Piece, block: Block, buffer: Buffer, shard: Shard, actions: Actions) -> None:
    """Edits and casts one piece, in the buffer."""
    old, new = piece.source, piece.target
    begin = old.begin - block.source[0]
    place = block.offset + new.begin - block.target[0]
    if not piece.edited and not piece.cast:
        if block.cast:
            size = old.end - old.begin
            buffer.view(place, place + size)[:] = buffer.view(begin, begin + size)
        return
    try:
        with _Placed(buffer, begin, old.dtype, old.shape) as before:
            if not block.cast:
                actions.edit(shard, old.name, before)
                return
            with _Placed(buffer, place, new.dtype, new.shape) as after:
                edit = partial(actions.edit, shard, old.name) if piece.edited else None
                _edit_and_cast(before, after, edit)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{old.name}: {error}") from error


def _edit_and_cast(old: Tensor, new: Tensor, edit: Callable[[Tensor], None] | None) -> None:
    """The edit is done in the wider of the two dtypes, so that rounding happens once."""
    work = torch.promote_types(old.dtype, new.dtype)
    if edit is None:
        new.copy_(old)
    elif work == new.dtype:
        new.copy_(old)
        edit(new)
    else:
        old = old if work == old.dtype else old.to(work)
        edit(old)
        new.copy_(old)
    if not _finite(new) and _finite(old):
        raise ValueError(
            f"its values go beyond {new.dtype}, at most {torch.finfo(new.dtype).max:.5g}"
        )


def _finite(tensor: Tensor) -> bool:
    """Without a mask of the tensor's size."""
    return not tensor.numel() or bool(torch.linalg.vector_norm(tensor, torch.inf).isfinite())


class _Placed:
    """The tensor at a place of a buffer; a copy, which is put back, where it is not aligned."""

    def __init__(self, buffer: Buffer, begin: int, dtype: str, shape: tuple[int, ...]) -> None:
        self._bytes: Tensor | None = None
        kind = DTYPES[dtype]
        if begin % kind.itemsize == 0:
            self._tensor = buffer.tensor(begin, kind, shape)
            return
        count = torch.Size(shape).numel() * kind.itemsize
        self._bytes = buffer.tensor(begin, torch.uint8, (count,))
        self._tensor = self._bytes.clone().view(kind).view(shape)

    def __enter__(self) -> Tensor:
        return self._tensor

    def __exit__(self, *error: object) -> None:
        if self._bytes is not None:
            self._bytes.copy_(self._tensor.reshape(-1).view(torch.uint8))


def _advise(descriptor: int, position: int, length: int, advice: str) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, position, length, getattr(os, advice))
