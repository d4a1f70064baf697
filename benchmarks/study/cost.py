"""The cost of a block of code: time and peak memory."""

from __future__ import annotations

import time
from types import TracebackType

import torch

from benchmarks.common.memory import PeakGrowth


class Cost:
    """Context manager. Afterwards it has `seconds`, and `mib`: the peak growth of the process on a
    CPU, of torch's allocations on a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None

    def __enter__(self) -> Cost:
        if self._cuda is None:
            self._memory = PeakGrowth(sharp=True).__enter__()
        else:
            torch.cuda.synchronize(self._cuda)
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._before = torch.cuda.memory_allocated(self._cuda)
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        self.seconds = time.perf_counter() - self._began
        if self._cuda is None:
            self._memory.__exit__(kind, error, trace)
            self.mib = self._memory.mib
        else:
            self.mib = (torch.cuda.max_memory_allocated(self._cuda) - self._before) / 2**20
