"""Which of several ways to the same result is fastest here: measured once a shape, then remembered.

LORA_KERNELS_TUNE=0 takes the first way always, which makes results the same bits in every process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Result = TypeVar("Result")
ROUNDS = 5
CHOSEN: dict[Hashable, str] = {}


def fastest(key: Hashable, ways: dict[str, Callable[[], Result]], device: torch.device) -> Result:
    """The result of the fastest of `ways`; of the first where nothing can be measured.

    While a CUDA graph is captured nothing can be: warm up before, as graphs want it anyway.
    """
    if len(ways) == 1:
        return next(iter(ways.values()))()
    name = CHOSEN.get(key)
    if name not in ways:
        name = next(iter(ways))
        if _can_measure(device):
            name = CHOSEN[key] = min(ways, key=lambda n: _milliseconds(ways[n]))
    return ways[name]()


def _can_measure(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and os.environ.get("LORA_KERNELS_TUNE", "1") != "0"
        and not torch.cuda.is_current_stream_capturing()
    )


def _milliseconds(way: Callable[[], object]) -> float:
    """The shortest of ROUNDS, after a first run that compiles."""
    way()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        way()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)
