"""How far a block of code lets the process grow."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from types import TracebackType

import psutil

INTERVAL = 0.002  # seconds between two looks at the resident size


class PeakGrowth:
    """Context manager; `mib` is the highest resident memory inside, less that at its start."""

    mib: float = 0.0

    def __enter__(self) -> PeakGrowth:
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
        self.mib = (self._peak - self._start) / 2**20

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, self._process.memory_info().rss)


def _return_freed_memory() -> None:
    """Without it, memory that an earlier method freed would hide what the next one takes."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
