"""Device time by CUDA events, in the same interleaved rounds as the CPU benchmarks.

Two clocks. "as called": the calls follow each other as a program makes them, so that a small
layer's time is the host's time to launch it. "device": the GPU is kept busy until the host has
queued all calls, so that only the GPU's own time counts.
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
_CYCLES_PER_SECOND = 2e9  # about the SM clock; a slower one only waits longer
_LONGEST_WAIT = 0.2  # seconds
_MARGIN = 50e-6  # seconds


class Clock:
    """Runs a variant `calls` times in a row and gives the seconds of one call."""

    def __init__(self, device: torch.device, calls: int = 1, kind: str = AS_CALLED) -> None:
        self.device, self.calls, self.kind = device, calls, kind
        self._host: dict[int, float] = {}  # the fastest that the host queued each variant

    def __call__(self, variant: Variant) -> float:
        """Any error that a kernel's compiler may raise becomes a RuntimeError."""
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
    """Takes the next of `calls` each time: other buffers, which the L2 does not hold any more."""
    following = cycle(calls)
    return lambda: next(following)()


def buffers(device: torch.device, bytes_each: int) -> int:
    """How many such buffers are more than three times the L2; two at least."""
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
    """Interleaved medians; all variants make the same number of calls per round.

    The first variant, which is the baseline of the ratios, sets that number so that they take
    about `burst_ms`; it is a multiple of `multiple`, the number of buffers that a variant rotates
    among.
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
        return multiple  # the rounds will say why
    bursts = burst_ms / 1e3 / max(seconds * multiple, 1e-9)
    return multiple * max(1, min(math.ceil(bursts), MAX_CALLS // multiple))
