"""A stand-in for the CUDA driver, so that the Python code of a launch runs on any machine.

Triton binds and specializes the arguments and looks up the kernel as on a GPU. The stand-in records
the kernel instead of compiling and launching it. The stand-in does not work with TRITON_INTERPRET
set, because Triton's interpreter does not bind arguments.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Driver:
    """The methods of Triton's driver that a launch calls."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@dataclass
class Seen:
    """How often each kernel was launched, passed through Triton's binder and was compiled. If they
    are kept, also the time of its last launch and the arguments of all launches.
    """

    launches: Counter[str] = field(default_factory=Counter)
    binder: Counter[str] = field(default_factory=Counter)
    compiled: Counter[str] = field(default_factory=Counter)
    last_launch: dict[str, float] | None = None
    arguments: list[tuple] | None = None


class Kernel:
    """The attributes of a compiled kernel that a launch uses."""

    function, packed_metadata = 0, ()

    def __init__(self, name: str, seen: Seen) -> None:
        self.name, self.seen = name, seen

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    def run(self, *arguments) -> None:
        self.seen.launches[self.name] += 1
        if self.seen.last_launch is not None:
            self.seen.last_launch[self.name] = time.perf_counter()
        if self.seen.arguments is not None:
            self.seen.arguments.append((self.name, arguments))


@contextlib.contextmanager
def stand_in(
    arch: int = 90, keep_arguments: bool = False, keep_times: bool = False
) -> Iterator[Seen]:
    """Compile and launch nothing inside the block; yield a record of the calls.

    Keeping arguments or times costs time in every launch (0.5 us for the times).
    """
    seen = Seen(last_launch={} if keep_times else None, arguments=[] if keep_arguments else None)
    run, made = JITFunction.run, []

    def compile_(fn, key, signature, device, *rest) -> Kernel:
        seen.compiled[fn.__name__] += 1
        kernel = Kernel(fn.__name__, seen)
        cache = fn.device_caches[device][0]
        cache[key] = kernel
        made.append((cache, key))
        return kernel

    def bind(fn, *args, **kwargs):
        seen.binder[fn.__name__] += 1
        return run(fn, *args, **kwargs)

    try:
        with (
            mock.patch.object(driver, "_active", Driver(arch)),
            mock.patch.object(JITFunction, "_do_compile", compile_),
            mock.patch.object(JITFunction, "run", bind),
        ):
            yield seen
    finally:
        for cache, key in made:
            del cache[key]
