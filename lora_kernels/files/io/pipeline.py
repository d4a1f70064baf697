"""Blocks of files read, worked on and written by a few threads at the same time.

Each thread takes a block through all three: what it reads is still in its caches when it is worked
on. System calls and torch's operators release the interpreter lock. Files are read and written with
positioned calls into memory that is used again, not mapped: a map counts as resident, and its page
faults cost more than the copy.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .blocks import BLOCK, Block, Piece
from .buffers import Buffer, BufferPool
from .layout import DTYPES, Layout

AHEAD = 8 * BLOCK  # of memory beside the largest block
_WORKERS = 4  # one copies 2 to 4 GB/s: more would wait for the disk
_READ = 1 << 30  # bytes a call: Linux transfers at most 2 GiB
# For larger calls Linux takes larger pages, which are seldom at hand: 1.6 s for 1.9 GB on ext4 with
# 16 MiB a call, 0.45 s with one.
_WRITE = 1 << 20


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

    def places(self, block: Block) -> tuple[int, int, int]:
        """Where in a buffer the block's old bytes and its new ones lie, and its size."""
        return block.places(self.source_layout.start, self.target_layout.start)


@dataclass
class Actions:
    """What is done on the way; all of it is called from several threads.

    `edit(shard, name, weight)` changes an edited tensor in place. `finished(shard)` is called once
    the shard's target is whole, for one shard at a time. `advanced(bytes)` says how many more of
    the source's bytes are dealt with.
    """

    edit: Callable[[Shard, str, Tensor], None]
    finished: Callable[[Shard], None] = field(default=lambda shard: None)
    advanced: Callable[[int], None] = field(default=lambda count: None)


def run(shards: Sequence[Shard], actions: Actions) -> None:
    """Rewrites the shards.

    In memory are the largest block and `AHEAD` bytes more, beside what `edit` needs.

    Raises:
        ValueError, TypeError: what `edit` raises, with the tensor's name before it; a value that
            the new dtype cannot hold.
        OSError: a file cannot be read or written.

    """
    threads = torch.get_num_threads()
    workers = max(2, min(_WORKERS, threads))
    rewriting = _Rewriting(shards, actions, max(1, threads // workers))
    with ThreadPoolExecutor(workers, "rewrite") as pool:
        futures = [pool.submit(rewriting.work) for _ in range(workers)]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            rewriting.stop()
            wait(futures)
            rewriting.close()
            torch.set_num_threads(threads)  # a setting of each thread, and of those to come


class _Rewriting:
    """What the threads share."""

    def __init__(self, shards: Sequence[Shard], actions: Actions, threads: int) -> None:
        largest = max((s.places(block)[2] for s in shards for block in s.blocks), default=0)
        self._buffers = BufferPool(largest + AHEAD)
        self._actions = actions
        self._threads = threads
        self._files = [_Files(shard) for shard in shards]
        self._tasks = deque((f, block) for f in self._files for block in f.shard.blocks or (None,))
        self._finishing = threading.Lock()
        self._stopped = False

    def work(self) -> None:
        """Takes one block after the other until there is none."""
        torch.set_num_threads(self._threads)
        while not self._stopped:
            try:
                files, block = self._tasks.popleft()
            except IndexError:
                return
            with files.opened:
                files.open()
            if block is not None:
                self._rewrite(files, block)
                self._actions.advanced(block.source_size)
            if files.is_last():
                files.close()
                with self._finishing:
                    self._actions.finished(files.shard)

    def stop(self) -> None:
        """No further block is begun."""
        self._stopped = True
        self._buffers.close()

    def close(self) -> None:
        """Closes what an error left open."""
        for files in self._files:
            files.close()

    def _rewrite(self, files: _Files, block: Block) -> None:
        old, new, size = files.shard.places(block)
        buffer = self._buffers.take(size)
        try:
            files.read(block, buffer.view(old, old + block.source_size))
            for piece in block.pieces:
                begin = old + piece.source.begin - block.source[0]
                end = new + piece.target.begin - block.target[0]
                _work(piece, buffer, begin, end, partial(self._actions.edit, files.shard))
            files.write(block, buffer.view(new, new + block.target_size))
        finally:
            self._buffers.give_back(buffer)


class _Files:
    """A shard's two files."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.opened = threading.Lock()
        self._writing = threading.Lock()
        self._left = max(1, len(shard.blocks))
        self._source: int | None = None
        self._target: int | None = None

    def open(self) -> None:
        """Opens both, if they are not, and begins the new one."""
        if self._source is not None:
            return
        self._source = os.open(self.shard.source, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if self.shard.target is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            self._target = os.open(self.shard.target, flags, 0o666)
            self._write(memoryview(self.shard.target_layout.head()), 0)

    def is_last(self) -> bool:
        """To be asked after each block: whether it was the last one to be done."""
        with self.opened:
            self._left -= 1
            return self._left == 0

    def read(self, block: Block, view: memoryview) -> None:
        """The block's bytes."""
        position = self.shard.source_layout.start + block.source[0]
        done = 0
        while done < len(view):
            count = os.preadv(self._source, [view[done : done + _READ]], position + done)
            if count == 0:
                raise OSError(f"{self.shard.source} became shorter while it was read")
            done += count

    def write(self, block: Block, view: memoryview) -> None:
        """The new bytes."""
        if self.shard.target is not None:
            with self._writing:  # the system lets one write at a time: a second would spin
                self._write(view, self.shard.target_layout.start + block.target[0])

    def close(self) -> None:
        """Closes what is open."""
        for descriptor in (self._source, self._target):
            if descriptor is not None:
                os.close(descriptor)
        self._source = self._target = None

    def _write(self, view: memoryview, position: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._target, view[done : done + _WRITE], position + done)
            except OSError as error:  # which does not know the file's name
                file = str(self.shard.target)
                raise OSError(error.errno, error.strerror, file) from None


def _work(
    piece: Piece, buffer: Buffer, begin: int, place: int, edit: Callable[[str, Tensor], None]
) -> None:
    """Edits and casts one piece, which lies at `begin`, and is to lie at `place`."""
    old, new = piece.source, piece.target
    if not piece.edited and not piece.cast:
        if begin != place:
            size = old.end - old.begin
            buffer.view(place, place + size)[:] = buffer.view(begin, begin + size)
        return
    try:
        with _Placed(buffer, begin, old.dtype, old.shape) as before:
            if begin == place:
                edit(old.name, before)
                return
            with _Placed(buffer, place, new.dtype, new.shape) as after:
                _edit_and_cast(before, after, partial(edit, old.name) if piece.edited else None)
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
