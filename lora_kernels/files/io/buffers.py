"""Reusable buffers of limited total size."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from typing import Any

import torch
from torch import Tensor


class Buffer:
    """Page-aligned memory for the content of files; tensors are views of it."""

    def __init__(self, size: int) -> None:
        # Private, because shared memory gets no huge pages.
        kind = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        self._memory = mmap.mmap(-1, max(size, 1), **kind)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer page faults
        self.capacity = size

    def view(self, begin: int, end: int) -> memoryview:
        return memoryview(self._memory)[begin:end]

    def tensor(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A view of the bytes from `begin` on as a tensor."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(shape)


class BufferPool:
    """A thread-safe pool of reusable buffers, at most `limit` bytes in total."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._allocated = 0
        self._free: list[Buffer] = []
        self._changed = threading.Condition()
        self._closed = False

    def take(self, size: int) -> Buffer:
        """Waits for a buffer of at least `size` bytes; `size` is at most the limit.

        Raises:
            RuntimeError: the pool is closed.

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
                # All free buffers are too small: some are released to make room for a larger one.
                self._free.sort(key=lambda b: b.capacity)
                while self._free and self._allocated + size > self._limit:
                    self._allocated -= self._free.pop().capacity
                if self._allocated + size <= self._limit:
                    self._allocated += size
                    return Buffer(size)
                self._changed.wait()

    def give_back(self, buffer: Buffer) -> None:
        """Returns a buffer to the pool; views of it must no longer be used."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """Makes `take` raise an error, also in threads that are already waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; a view if it is contiguous and on the CPU."""
    tensor = tensor.detach().to("cpu").contiguous()
    size = tensor.numel() * tensor.element_size()
    view: Any = (ctypes.c_char * size).from_address(tensor.data_ptr() if size else 1)
    view.owner = tensor  # keeps the memory
    return memoryview(view)
