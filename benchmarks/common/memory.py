"""How much the memory of the process grows while a block of code runs."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from types import TracebackType

import psutil

INTERVAL = 0.002  # seconds between two readings of the resident size
M_MMAP_THRESHOLD = -3  # as in malloc.h


class PeakGrowth:
    """Context manager; `mib` is the peak resident memory minus that at the start.

    `sharp` makes the allocator return each large block as soon as it is freed; without it, free
    fragments of its heap count as used. It is slower where many blocks are allocated and freed.
    """

    mib: float = 0.0

    def __init__(self, sharp: bool = False) -> None:
        self._sharp = sharp

    def __enter__(self) -> PeakGrowth:
        if self._sharp:
            _release_blocks_from(1 << 20)
        _return_freed_memory()
        self._process = psutil.Process()
        self._start = self._peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._watcher.join()
        self._look()
        if self._sharp:
            _release_blocks_from(1 << 25)  # the highest threshold that glibc sets by itself
        self.mib = (self._peak - self._start) / 2**20

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)


def _return_freed_memory() -> None:
    """Return freed memory to the system, because memory that is reused would not show as growth."""
    gc.collect()
    _glibc("malloc_trim", 0)


def _release_blocks_from(size: int) -> None:
    """Make the allocator return blocks of at least `size` bytes as soon as they are freed."""
    _glibc("mallopt", M_MMAP_THRESHOLD, size)


def _glibc(function: str, *arguments: int) -> None:
    """Call a function of glibc. Without glibc do nothing, which makes `mib` less exact."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), function):
        getattr(library, function)(*arguments)
