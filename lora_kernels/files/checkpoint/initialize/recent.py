"""Starts of matrices that several tensors of a checkpoint hold, which are edited one by one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from ....init import Start

_LIMIT = 64 << 20  # bytes of factors that wait for the other tensors of their matrix


@dataclass(eq=False)
class _Waiting:
    lock: threading.Lock = field(default_factory=threading.Lock)
    start: Start | None = None
    size: int = 0
    remaining: int = 0


class RecentStarts:
    """Keeps a start until all tensors of its matrix are edited, but at most `limit` bytes of
    starts. A start that was not kept is computed again, to the same bits.
    """

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit, self._size = limit, 0
        self._waiting: dict[Hashable, _Waiting] = {}
        self._lock = threading.Lock()

    def take(self, key: Hashable, uses: int, make: Callable[[], Start]) -> Start:
        """The start of the matrix `key`. `uses` is how often this method is called for that matrix.
        A thread waits while another thread computes the same start.
        """
        with self._lock:
            entry = self._waiting.setdefault(key, _Waiting(remaining=uses))
        with entry.lock:
            start = entry.start or make()
            with self._lock:
                entry.remaining -= 1
                if entry.start is None and entry.remaining:
                    self._keep(entry, start)
                elif not entry.remaining:
                    self._size -= entry.size
                    del self._waiting[key]
        return start

    def _keep(self, entry: _Waiting, start: Start) -> None:
        size = start.lora_A.nbytes + start.lora_B.nbytes
        if self._size + size <= self._limit:
            entry.start, entry.size = start, size
            self._size += size
