"""Memory that is used again and again, within a limit."""

from __future__ import annotations

import mmap
import os
import threading

import torch
from torch import Tensor


class Buffer:
    """Page-aligned bytes that files are read into and tensors lie in."""

    def __init__(self, size: int) -> None:
        # Private, as shared memory gets no huge pages.
        kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        self._memory = mmap.mmap(-1, max(size, 1), **kind)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
        self.capacity = size

    def view(self, begin: int, end: int) -> memoryview:
        """The bytes [begin, end), writable."""
        return memoryview(self._memory)[begin:end]

    def tensor(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor over the bytes from `begin` on."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(shape)


class BufferPool:
    """Buffers of any size, together at most `limit` bytes. Of several threads, one takes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._allocated = 0
        self._free: list[Buffer] = []
        self._changed = threading.Condition()
        self._closed = False

    def take(self, size: int) -> Buffer:
        """A buffer of at least `size` bytes, which is at most the limit; waits for one.

        Raises:
            RuntimeError: the pool was closed.

        """
        with self._changed:
            while True:
                if self._closed:
                    raise RuntimeError("the buffers are closed")
                fitting = [b for b in self._free if b.capacity >= size]
                if fitting:
                    buffer = min(fitting, key=lambda b: b.capacity)
                    self._free.remove(buffer)
                    return buffer
                # The free ones are too small: they make room for one that is not.
                self._free.sort(key=lambda b: b.capacity)
                while self._free and self._allocated + size > self._limit:
                    self._allocated -= self._free.pop().capacity
                if self._allocated + size <= self._limit:
                    self._allocated += size
                    return Buffer(size)
                self._changed.wait()

    def give_back(self, buffer: Buffer) -> None:
        """For the next one who takes; no view or tensor over it may be used any more."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """Whoever waits for a buffer gets an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
