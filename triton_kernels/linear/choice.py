"""Choose the fastest of several ways to compute a result: measured once per shape, then remembered.

With LORA_KERNELS_TUNE=0 or torch.use_deterministic_algorithms(True) the first way is always used,
so that results have the same bits in every process.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from triton.runtime.errors import OutOfResources

Result = TypeVar("Result")
ROUNDS = 5
AHEAD = 1_000_000  # clock cycles, half a millisecond: an upper bound for the launches of a round
CHOSEN: dict[tuple, str] = {}
_warned: set[tuple[str, type]] = set()


def fastest(
    key: tuple,
    ways: dict[str, Callable[[], Result]],
    device: torch.device,
    count_launches: bool = False,
) -> Result:
    """The result of the fastest of `ways`, or of the first if nothing can be measured.

    Only the time on the device is compared, because the host is ahead of the device in longer
    calls. With `count_launches`, for short calls, the host's time is included. A CUDA graph does
    not spend that time, so there such calls use the first way.
    """
    if len(ways) == 1:
        return next(iter(ways.values()))()
    key = (*key, *ways)  # a choice among other ways (of a layer with R, say) does not apply
    name = CHOSEN.get(key)
    known = name is not None
    if known and not count_launches:
        return ways[name]()
    first = next(iter(ways))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        name = first if count_launches or not known else name
    elif not known:
        name = first
        if _can_measure(device):
            name = CHOSEN[key] = _measured(ways, device, count_launches)
    return ways[name]()


def _can_measure(device: torch.device) -> bool:
    wanted = os.environ.get("LORA_KERNELS_TUNE", "1") != "0"
    return device.type == "cuda" and wanted and not torch.are_deterministic_algorithms_enabled()


def _measured(
    ways: dict[str, Callable[[], object]], device: torch.device, count_launches: bool
) -> str:
    """The name of the fastest. Ways that fail are left out with a warning; raises if all fail."""
    times, failures = {}, []
    for name, way in ways.items():
        try:
            times[name] = _milliseconds(way, device, count_launches)
        except (OutOfResources, torch.OutOfMemoryError) as error:
            failures.append(error)  # this GPU is too small for this way; no warning needed
        except Exception as error:  # Triton's compiler may raise anything
            failures.append(error)
            _warn(name, error)
    if not times:
        raise failures[0]
    return min(times, key=times.get)


def _warn(name: str, error: Exception) -> None:
    kind = (name, type(error))
    if kind in _warned:
        return
    _warned.add(kind)
    warnings.warn(
        f"lora_kernels: the way {name!r} does not work on this GPU and is left out; please report "
        f"it. {type(error).__name__}: {str(error)[:500]}",
        RuntimeWarning,
        stacklevel=2,
    )


def _milliseconds(way: Callable[[], object], device: torch.device, count_launches: bool) -> float:
    """The shortest time of ROUNDS, after a call that compiles. Each round begins with none of the
    data in the L2 cache, which other layers of a model would have overwritten.
    """
    way()
    best = math.inf
    flush = torch.empty(2 * _l2_bytes(device), dtype=torch.uint8, device=device)
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda.synchronize(device)
        if not count_launches:
            torch.cuda._sleep(AHEAD)  # so that all launches are queued before the first begins
        begin.record()
        way()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end))
    return best


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size
