"""Rewrites files: a few threads read, edit and write blocks at the same time.

Each thread takes a block through all three steps, so that the bytes are still in its caches when it
edits them. System calls and torch's operators release the interpreter lock. Files are read and
written by positioned calls with reused buffers, not mapped: a mapping counts as resident memory,
and its page faults cost more than the copy.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..._utils.checks import all_finite
from ..._utils.safetensors import DTYPES, Layout
from .blocks import BLOCK, Block, Piece
from .buffers import Buffer, BufferPool, memory_of

_CLOSED = -1  # in place of a file descriptor
AHEAD = 8 * BLOCK  # bytes of memory in addition to the largest block
_WORKERS = 4  # one thread copies 2 to 4 GB/s; more than four would wait for the disk
_READ = 1 << 30  # bytes per call: Linux transfers at most 2 GiB
# For larger calls Linux uses larger pages, which are rarely available: writing 1.9 GB on ext4 takes
# 1.6 s with 16 MiB per call, and 0.45 s with 1 MiB.
_WRITE = 1 << 20


@dataclass(eq=False)
class Shard:
    """A file to rewrite. Without a `target` nothing is written: the tensors are only read.

    `added` has the tensors of the target that the source does not have, by name.
    """

    source: Path
    source_layout: Layout
    target: Path | None
    target_layout: Layout
    blocks: Sequence[Block]
    added: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def size(self) -> int:
        """How many bytes are read from the source."""
        return sum(block.source_size for block in self.blocks)

    def places(self, block: Block) -> tuple[int, int, int]:
        """See `Block.places`."""
        return block.places(self.source_layout.data_offset, self.target_layout.data_offset)


@dataclass
class Actions:
    """Callbacks of `rewrite`; all are called from several threads.

    `edit(shard, piece, weight)` changes an edited tensor or slice in place. `finished(shard)` is
    called when the shard's target is complete, for one shard at a time. `advanced(bytes)` is called
    with the number of source bytes of each finished block.
    """

    edit: Callable[[Shard, Piece, Tensor], None]
    finished: Callable[[Shard], None] = field(default=lambda shard: None)
    advanced: Callable[[int], None] = field(default=lambda count: None)


def rewrite(shards: Sequence[Shard], actions: Actions) -> None:
    """Rewrites the shards. The buffers take the memory of the largest block plus `AHEAD` bytes.

    Raises:
        ValueError, TypeError: raised by `edit`, with the tensor's name in front; or the new dtype
            cannot hold a value.
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
            torch.set_num_threads(threads)  # this also sets it for threads that start later


class _Rewriting:
    """The state that the threads share."""

    def __init__(self, shards: Sequence[Shard], actions: Actions, threads: int) -> None:
        largest = max((s.places(block)[2] for s in shards for block in s.blocks), default=0)
        self._buffers = BufferPool(largest + AHEAD)
        self._actions = actions
        self._threads = threads
        self._files = [_Files(shard) for shard in shards]
        self._tasks = deque((f, block) for f in self._files for block in f.shard.blocks or (None,))
        self._finish_lock = threading.Lock()
        self._stopped = False

    def work(self) -> None:
        """Rewrites one block after the other until none is left."""
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
                files.write_added()
                files.close()
                with self._finish_lock:
                    self._actions.finished(files.shard)

    def stop(self) -> None:
        """Keeps all threads from beginning another block."""
        self._stopped = True
        self._buffers.close()

    def close(self) -> None:
        """Closes the files that are still open after an error."""
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
                _rewrite_piece(piece, buffer, begin, end, partial(self._actions.edit, files.shard))
            files.write(block, buffer.view(new, new + block.target_size))
        finally:
            self._buffers.give_back(buffer)


class _Files:
    """The source and target files of a shard."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.opened = threading.Lock()
        self._write_lock = threading.Lock()
        self._remaining = max(1, len(shard.blocks))
        self._source = self._target = _CLOSED

    def open(self) -> None:
        """Opens both files, if they are not open yet, and writes the target's header."""
        if self._source != _CLOSED:
            return
        self._source = os.open(self.shard.source, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if self.shard.target is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            self._target = os.open(self.shard.target, flags, 0o666)
            self._write(memoryview(self.shard.target_layout.head()), 0)

    def is_last(self) -> bool:
        """Whether this was the last block of the shard; called once after each block."""
        with self.opened:
            self._remaining -= 1
            return self._remaining == 0

    def read(self, block: Block, view: memoryview) -> None:
        position = self.shard.source_layout.data_offset + block.source[0]
        done = 0
        while done < len(view):
            count = os.preadv(self._source, [view[done : done + _READ]], position + done)
            if count == 0:
                raise OSError(f"{self.shard.source} was truncated while it was read")
            done += count

    def write(self, block: Block, view: memoryview) -> None:
        if self.shard.target is not None:
            with self._write_lock:  # the system lets only one thread write: a second one would spin
                self._write(view, self.shard.target_layout.data_offset + block.target[0])

    def write_added(self) -> None:
        """Writes the tensors that the source does not have."""
        layout = self.shard.target_layout
        for entry in layout.entries if self.shard.target is not None else ():
            if entry.name in self.shard.added:
                content = memory_of(self.shard.added[entry.name])
                self._write(content, layout.data_offset + entry.begin)

    def close(self) -> None:
        for descriptor in (self._source, self._target):
            if descriptor != _CLOSED:
                os.close(descriptor)
        self._source = self._target = _CLOSED

    def _write(self, view: memoryview, position: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._target, view[done : done + _WRITE], position + done)
            except OSError as error:  # the message lacks the file's name
                file = str(self.shard.target)
                raise OSError(error.errno, error.strerror, file) from None


def _rewrite_piece(
    piece: Piece, buffer: Buffer, begin: int, place: int, edit: Callable[[Piece, Tensor], None]
) -> None:
    """Edits and casts the piece at offset `begin` of the buffer, and puts the result at `place`."""
    old, new = piece.source, piece.target
    if not piece.edited and not piece.cast:
        if begin != place:
            size = old.end - old.begin
            buffer.view(place, place + size)[:] = buffer.view(begin, begin + size)
        return
    try:
        with _Placed(buffer, begin, old.dtype, old.shape) as before:
            if begin == place:
                edit(piece, before)
                return
            with _Placed(buffer, place, new.dtype, new.shape) as after:
                _edit_and_cast(before, after, partial(edit, piece) if piece.edited else None)
    except (ValueError, TypeError) as error:
        where = old.name if piece.index is None else f"{old.name}[{piece.index}]"
        raise type(error)(f"{where}: {error}") from error


def _edit_and_cast(old: Tensor, new: Tensor, edit: Callable[[Tensor], None] | None) -> None:
    """Edits the tensor in the wider of the two dtypes, so that values are rounded only once."""
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
    if not all_finite(new) and all_finite(old):
        raise ValueError(
            f"its values exceed the range of {new.dtype}, at most {torch.finfo(new.dtype).max:.5g}"
        )


class _Placed:
    """The tensor at an offset of a buffer; if not aligned there, a copy that is copied back."""

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
