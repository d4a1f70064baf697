"""Side-by-side timing: the variants take turns in one process, so noise affects all of them."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Environment variables that limit the instruction sets of torch's libraries.
TORCH_LIMITS = {"MKL": "MKL_ENABLE_INSTRUCTIONS", "oneDNN": "ONEDNN_MAX_CPU_ISA"}
# The errors that other libraries raise for an unsupported dtype or shape.
UNSUPPORTED = (RuntimeError, NotImplementedError, TypeError, ValueError)


@dataclass(frozen=True)
class Variant:
    """Something to time.

    `prepare` runs before each round and is not timed; its result is passed to `run`. A slow variant
    can have its own, smaller number of `rounds` and skip the `warmup`.
    """

    run: Callable[..., object]
    prepare: Callable[[], Any] | None = None
    rounds: int | None = None
    warmup: int | None = None


@dataclass
class Timing:
    """The seconds of one variant by round, and their ratios to the baseline in the same rounds."""

    name: str
    seconds: dict[int, float] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    failure: str | None = None

    def quantile(self, q: float) -> float:
        """A quantile of the seconds; NaN if there are none."""
        return float(np.quantile(list(self.seconds.values()), q)) if self.seconds else float("nan")

    def ratio(self, q: float = 0.5) -> float:
        """A quantile of the ratios, by default the median; NaN if there are none."""
        return float(np.quantile(self.ratios, q)) if self.ratios else float("nan")

    @property
    def family(self) -> str:
        """The first word of the name: "PEFT" of "PEFT pissa"."""
        return self.name.split()[0]

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def row(self) -> dict[str, object]:
        """One row of a CSV file; times in milliseconds."""
        if self.failure:
            return {"variant": self.name, "failure": self.failure}
        return {
            "variant": self.name,
            "median_ms": 1e3 * self.median,
            "min_ms": 1e3 * self.quantile(0.0),
            "q1_ms": 1e3 * self.quantile(0.25),
            "q3_ms": 1e3 * self.quantile(0.75),
            "ratio": self.ratio(),
            "ratio_p10": self.ratio(0.1),
            "ratio_p90": self.ratio(0.9),
            "rounds": len(self.seconds),
            "failure": "",
        }


def interleave(
    variants: Mapping[str, Callable[[], object] | Variant],
    *,
    rounds: int = 15,
    warmup: int = 2,
    baseline: str | None = None,
    clock: Callable[[Variant], float] | None = None,
) -> list[Timing]:
    """Time every variant `rounds` times; each round starts with a different variant.

    A variant that raises one of `UNSUPPORTED` is dropped, and the reason is recorded. Ratios to the
    `baseline` (by default the first variant) are computed within each round, not between medians,
    so that a slow phase of the machine cancels out. `clock` runs a variant and returns seconds; by
    default it is the wall clock.
    """
    clock = clock or _time_once
    known = {n: v if isinstance(v, Variant) else Variant(v) for n, v in variants.items()}
    baseline = baseline or next(iter(known))
    timings = {name: Timing(name) for name in known}
    counts = {n: rounds if v.rounds is None else v.rounds for n, v in known.items()}
    warmups = {n: warmup if v.warmup is None else v.warmup for n, v in known.items()}

    def attempt(name: str) -> float | None:
        if timings[name].failure:
            return None
        try:
            return clock(known[name])
        except UNSUPPORTED as error:
            timings[name].failure = f"fails: {type(error).__name__}: {_first_line(error)}"
            return None

    names = list(known)
    for name in names:
        for _ in range(warmups[name]):
            attempt(name)
    for index in range(max(counts.values())):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            if index < counts[name] and (seconds := attempt(name)) is not None:
                timings[name].seconds[index] = seconds

    reference = timings[baseline].seconds
    for timing in timings.values():
        timing.ratios = [s / reference[i] for i, s in timing.seconds.items() if i in reference]
    return list(timings.values())


def environment(gpu: torch.device | None = None) -> dict[str, str]:
    """The hardware and software versions, for a CSV; `gpu` is the device that was measured.

    The result names no path, host or user.
    """
    if gpu is None or gpu.type != "cuda":
        where = {"device": device_name(), **cpu_kernels()}
    else:
        where = {
            "device": torch.cuda.get_device_name(gpu),
            "cpu": device_name(),
            "cuda": str(torch.version.cuda),
            "triton": _version("triton"),
        }
    return {
        **where,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": _version("peft"),
    }


def cpu_kernels() -> dict[str, str]:
    """The instruction sets that our kernels and torch's use, and the processor's best.

    If the sets are limited, the caches are still those of the newer processor.
    """
    from lora_kernels.ops import cpu_capabilities, cpu_capability

    limits = [
        f"{library} {os.environ[name]}"
        for library, name in TORCH_LIMITS.items()
        if name in os.environ
    ]
    return {
        "kernels": cpu_capability(),
        "torch_kernels": ", ".join([torch.backends.cpu.get_cpu_capability(), *limits]),
        "processor": (cpu_capabilities() or ["unknown"])[-1],
    }


def device_name() -> str:
    """The name of the CPU, for instance "AMD EPYC"."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return name


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> "bf16"."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _time_once(variant: Variant) -> float:
    arguments = () if variant.prepare is None else (variant.prepare(),)
    _synchronize()
    start = time.perf_counter()
    result = variant.run(*arguments)
    _synchronize()
    seconds = time.perf_counter() - start
    del result  # freed outside the timed region, before the next variant allocates memory
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:120]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
