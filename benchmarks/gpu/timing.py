"""Times measured with CUDA events, in interleaved rounds like those of the CPU benchmarks.

There are two clocks. "as called": calls follow each other as in a program, so the time of a small
layer is the host's time to launch it. "device": the GPU is kept busy until the host has queued all
calls, so only the time on the GPU is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle

import torch

from benchmarks.common.harness import UNSUPPORTED, Timing, Variant, interleave

AS_CALLED, DEVICE = "as called", "device"
CLOCKS = (AS_CALLED, DEVICE)
MAX_CALLS = 30  # the driver's launch queue holds about 1000 kernels
_CYCLES_PER_SECOND = 2e9  # about the GPU's clock rate; on a slower GPU the wait is longer
_LONGEST_WAIT, _MARGIN = 0.2, 50e-6  # seconds


class Clock:
    """Runs a variant `calls` times in a row and returns the seconds per call."""

    def __init__(self, device: torch.device, calls: int = 1, kind: str = AS_CALLED) -> None:
        self.device, self.calls, self.kind = device, calls, kind
        self._host: dict[int, float] = {}  # the host's shortest time to queue each variant

    def __call__(self, variant: Variant) -> float:
        """Time `variant`; any error not in `UNSUPPORTED` becomes a RuntimeError."""
        arguments = () if variant.prepare is None else (variant.prepare(),)
        try:
            measure = self._on_gpu if self.device.type == "cuda" else self._on_cpu
            return measure(variant, arguments) / self.calls
        except UNSUPPORTED:
            raise
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def _on_gpu(self, variant: Variant, arguments: tuple) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        known = self._host.get(id(variant))
        if self.kind == DEVICE and known is not None:
            wait = min(1.5 * known + _MARGIN, _LONGEST_WAIT)
            torch.cuda._sleep(int(wait * _CYCLES_PER_SECOND))
        start = time.perf_counter()
        begin.record()
        self._calls(variant, arguments)
        end.record()
        queued = time.perf_counter() - start
        end.synchronize()
        self._host[id(variant)] = min(queued, known or queued)
        return begin.elapsed_time(end) / 1e3

    def _on_cpu(self, variant: Variant, arguments: tuple) -> float:
        start = time.perf_counter()
        self._calls(variant, arguments)
        return time.perf_counter() - start

    def _calls(self, variant: Variant, arguments: tuple) -> None:
        result = None
        for _ in range(self.calls):
            result = variant.run(*arguments)
        del result


def rotating(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that makes the next of `calls`, whose buffers the L2 cache no longer contains."""
    following = cycle(calls)
    return lambda: next(following)()


def buffers(device: torch.device, bytes_each: int) -> int:
    """The number of buffers that exceed three times the size of the L2 cache; at least two."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, math.floor(3 * l2 / bytes_each) + 1)


def measure(
    device: torch.device,
    variants: Mapping[str, Callable[[], object] | Variant],
    *,
    rounds: int,
    burst_ms: float = 0.0,
    multiple: int = 1,
    kind: str = AS_CALLED,
) -> list[Timing]:
    """Interleaved timings; all variants make the same number of calls per round.

    The number is chosen so that the calls of the first variant, the baseline of the ratios, take
    about `burst_ms`. It is a multiple of `multiple`, the number of buffers that a variant uses in
    turn.
    """
    first = next(iter(variants.values()))
    calls = _calls_for(device, first, burst_ms, multiple) if burst_ms else multiple
    return interleave(variants, rounds=rounds, warmup=2, clock=Clock(device, calls, kind))


def _calls_for(device: torch.device, run, burst_ms: float, multiple: int) -> int:
    variant = run if isinstance(run, Variant) else Variant(run)
    clock = Clock(device, calls=multiple)
    try:
        clock(variant)  # compiles
        seconds = clock(variant)
    except UNSUPPORTED:
        return multiple  # the rounds raise the same error, which is reported
    bursts = burst_ms / 1e3 / max(seconds * multiple, 1e-9)
    return multiple * max(1, min(math.ceil(bursts), MAX_CALLS // multiple))
