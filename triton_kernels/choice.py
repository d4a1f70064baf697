"""Which of several ways to the same result is fastest here: measured once a shape, then remembered.

LORA_KERNELS_TUNE=0 and torch.use_deterministic_algorithms(True) take the first way always, which
makes results the same bits in every process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources

Result = TypeVar("Result")
ROUNDS = 5
AHEAD = 1_000_000  # clock cycles, half a millisecond: what the launches of a round take at most
CHOSEN: dict[tuple, str] = {}


def fastest(
    key: tuple,
    ways: dict[str, Callable[[], Result]],
    device: torch.device,
    count_launches: bool = False,
) -> Result:
    """The result of the fastest of `ways`; of the first where nothing can be measured.

    What counts is the time on the device: where there is much to do, the host runs ahead. With
    `count_launches` the host's time counts as well, for calls so short that it is the longer one;
    not in a CUDA graph, which saves it, and there the first way is taken.
    """
    if len(ways) == 1:
        return next(iter(ways.values()))()
    first = next(iter(ways))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    name = first if capturing and count_launches else CHOSEN.get(key)
    if name not in ways:
        name = first
        if _can_measure(device) and not capturing:
            times = {n: _milliseconds(way, count_launches) for n, way in ways.items()}
            name = CHOSEN[key] = min(times, key=times.get)
    return ways[name]()


def _can_measure(device: torch.device) -> bool:
    wanted = os.environ.get("LORA_KERNELS_TUNE", "1") != "0"
    return device.type == "cuda" and wanted and not torch.are_deterministic_algorithms_enabled()


def _milliseconds(way: Callable[[], object], count_launches: bool) -> float:
    """The shortest of ROUNDS, after a first that compiles; infinite if this GPU is too small."""
    try:
        way()
    except (OutOfResources, torch.OutOfMemoryError):
        return math.inf
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if not count_launches:
            torch.cuda._sleep(AHEAD)  # the launches queue up behind it
        begin.record()
        way()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)
