"""Ahead-of-time compile gate: what the Python wrappers launch, compiled without a GPU.

No signature is written down twice: `record` runs the real wrappers, takes down the launches they
make instead of executing them, and `compile_launch` turns each into a cubin and reports on it.

    python -m tests.triton_kernels.aot [CASES_MODULE] [--arch 80 90 100] [--jobs 2]

`CASES_MODULE` has `CASES`, name -> callable taking the arch, and may have `EXPECTS`,
"case:kernel" -> {arch: instructions that every launch of that kernel in that case must contain}.
"""

from __future__ import annotations

import argparse
import contextlib
import copyreg
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCHS = (80, 90, 100)
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05": r"\btcgen05\.mma",
    "tma.load": r"\bcp\.async\.bulk\.tensor[\w.]*\.shared::\w+(::\w+)?\.global",
    "tma.store": r"\bcp\.async\.bulk\.tensor[\w.]*\.global\.shared",
    "cp.async": r"\bcp\.async\.c[ag]\.shared",
    "griddepcontrol.wait": r"\bgriddepcontrol\.wait",
    "griddepcontrol.launch_dependents": r"\bgriddepcontrol\.launch_dependents",
    "ld.global.128": r"\bld\.global[\w.:]*\.(v4\.[bfu]32|v2\.[bfu]64)\b",
    "ld.global.256": r"\bld\.global[\w.:]*\.(v8\.[bfu]32|v4\.[bfu]64)\b",
    "st.global.128": r"\bst\.global[\w.:]*\.(v4\.[bfu]32|v2\.[bfu]64)\b",
    "fma.f64": r"\bfma\.rn\.f64\b",
}


@dataclass(frozen=True)
class Launch:
    """A launch as Triton specialised it: all that decides the machine code."""

    fn: JITFunction
    arch: int
    key: str
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def identity(self) -> tuple[str, int, str]:
        """Equal for launches that compile to the same code."""
        return self.fn.cache_key, self.arch, self.key

    @property
    def arguments(self) -> dict[str, str]:
        """Type ("/16": divisible by 16) or constant value of each parameter, to be read."""
        described = {}
        for i, (name, kind) in enumerate(self.signature.items()):
            inner = {k[1:]: v for k, v in self.constexprs.items() if k[0] == i}
            aligned = "/16" if self.attrs.get((i,)) else ""
            described[name] = repr(inner[()]) if () in inner else f"{kind}{aligned}{inner or ''}"
        return described


@dataclass(frozen=True)
class Report:
    """One compiled launch; `instructions` counts those of `INSTRUCTIONS` in the PTX."""

    kernel: str
    arch: int
    arguments: dict[str, str]
    num_warps: int
    num_stages: int
    launch_pdl: bool
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]
    seconds: float
    case: str = ""
    missing: list[str] = field(default_factory=list)


class _Device:
    """As much of a driver as a launch asks before it compiles; its number is its arch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def record(function: Callable[[], Any], arch: int = 90) -> list[Launch]:
    """Run `function` and return the distinct launches it makes on `arch`; none is executed.

    Triton itself binds and specialises the arguments, so the rules are those of its version.
    Tensors may be on the CPU or on "meta", where large ones cost nothing.
    """
    launches: dict[tuple[str, int, str], Launch] = {}

    def take_down(fn, key, signature, device, constexprs, options, attrs, warmup) -> None:
        launch = Launch(fn, arch, key, signature, constexprs, attrs, dict(options.__dict__))
        # Returning no kernel makes `JITFunction.run` return before it launches anything.
        launches.setdefault(launch.identity, launch)

    with (
        mock.patch.object(driver, "_active", _Device(arch)),
        mock.patch.object(JITFunction, "_do_compile", take_down),
    ):
        function()
    return list(launches.values())


def compile_launch(launch: Launch) -> Report:
    """Compile as the runtime would and look at the PTX and the cubin."""
    start = time.perf_counter()
    source = ASTSource(launch.fn, launch.signature, launch.constexprs, launch.attrs)
    target = GPUTarget("cuda", launch.arch, 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    seconds = time.perf_counter() - start
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    resources = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    counts = {name: len(re.findall(regex, ptx)) for name, regex in INSTRUCTIONS.items()}
    return Report(
        kernel=launch.fn.__name__,
        arch=launch.arch,
        arguments=launch.arguments,
        num_warps=launch.options["num_warps"],
        num_stages=launch.options["num_stages"],
        launch_pdl=launch.options["launch_pdl"],
        registers=resources["REG"],
        stack=resources["STACK"] + resources["LOCAL"],
        shared=compiled.metadata.shared,
        instructions={name: count for name, count in counts.items() if count},
        seconds=round(seconds, 2),
    )


def _find(module: str, name: str) -> JITFunction:
    return attrgetter(name)(importlib.import_module(module))


# Kernels travel to the worker processes by name.
copyreg.pickle(JITFunction, lambda fn: (_find, (fn.__module__, fn.__qualname__)))


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The function's value, or what went wrong as a string."""
    try:
        return function(*args)
    except Exception as error:
        # Triton wraps what went wrong inside a kernel in a CompilationError about its call.
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        # A failing ptxas brings all of its input along.
        return "\ncaused by ".join(f"{type(each).__name__}: {each}"[:2000] for each in causes)


def _compile_all(launches: list[Launch], jobs: int) -> list[Report | str]:
    """Reports, or error messages, in order."""

    def pool(workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    futures = []
    with pool(jobs) as workers, contextlib.suppress(BrokenProcessPool):
        for launch in launches:
            futures.append(workers.submit(_attempt, compile_launch, launch))
    results = []
    for launch, future in itertools.zip_longest(launches, futures):
        # LLVM aborts rather than raises, and takes the launches of others along.
        if future is None or isinstance(future.exception(), BrokenProcessPool):
            with pool(1) as worker:
                future = worker.submit(_attempt, compile_launch, launch)
        broken = isinstance(future.exception(), BrokenProcessPool)
        crash = "the compiler crashed (its messages are on stderr)"
        results.append(crash if broken else future.result())
    return results


def check(module: Any, archs: tuple[int, ...] = ARCHS, jobs: int | None = None) -> list[dict]:
    """Record and compile all cases of a module; identical launches are compiled once."""
    recorded = {
        (case, arch): _attempt(record, lambda f=f, a=arch: f(a), arch)
        for case, f in module.CASES.items()
        for arch in archs
    }
    expects = dict(getattr(module, "EXPECTS", {}))
    unique = {x.identity: x for r in recorded.values() if not isinstance(r, str) for x in r}
    results = _compile_all([*unique.values()], jobs or os.cpu_count())
    compiled = dict(zip(unique, results, strict=True))
    reports, met = [], set()
    for (case, arch), launches in recorded.items():
        if isinstance(launches, str):
            reports.append({"case": case, "arch": arch, "error": launches})
            continue
        for launch in launches:
            result, name = compiled[launch.identity], launch.fn.__name__
            about = {"case": case, "arch": arch, "kernel": name}
            if isinstance(result, str):
                reports.append({**about, "arguments": launch.arguments, "error": result})
                continue
            met.add(f"{case}:{name}")
            wanted = expects.get(f"{case}:{name}", {}).get(arch, ())
            missing = [each for each in wanted if each not in result.instructions]
            reports.append({**asdict(result), "case": case, "missing": missing})
    if set(archs) != set(ARCHS):
        return reports  # what follows may be about the others
    for case in module.CASES:
        if not any(recorded[case, arch] for arch in archs):
            error = "the case launches no kernel on any arch"
            reports.append({"case": case, "arch": None, "error": error})
    for unmet in sorted(expects.keys() - met):
        error = f"EXPECTS names {unmet}, which compiled on none of the archs"
        reports.append({"case": unmet.partition(":")[0], "arch": None, "error": error})
    return reports


def main() -> None:
    """Print the reports on a cases module as one JSON list."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases_module", nargs="?", default="tests.triton_kernels.aot_cases")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    # Triton prints the log of a failing ptxas: keep standard output for the reports.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with output, tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # the workers inherit it: nothing stale is read
        module = importlib.import_module(arguments.cases_module)
        json.dump(check(module, tuple(arguments.arch), arguments.jobs), output, indent=1)


if __name__ == "__main__":
    main()
