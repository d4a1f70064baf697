"""Ahead-of-time compile gate: the launches of the Python wrappers, compiled without a GPU.

No signature is written down twice: `record` runs the real wrappers and records their launches
instead of executing them, and `compile_launch` compiles each to a cubin and reports on it.

    python -m tests.triton_kernels.aot [CASES_MODULE] [--arch 80 90 100] [--jobs 2] [--cache FOLDER]
        [--every 3]  # compiles one of every three launches of each kernel
    python -m tests.triton_kernels.aot --table  # rewrites resources.csv

`CASES_MODULE` has `CASES`, name -> callable that takes the arch, and may have `EXPECTS`,
"case:kernel" -> {arch: instructions that every launch of that kernel in that case must contain},
and `NEVER_LEFT_OUT`, the cases that `--every` does not thin.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copyreg
import importlib
import itertools
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import aot_table
from .aot_cache import Cache
from .aot_compile import Launch, Report, compile_launch

ARCHS = (80, 90, 100)


class _Device:
    """What a launch asks of a driver before it compiles; its number is its arch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def record(function: Callable[[], Any], arch: int = 90) -> list[Launch]:
    """Run `function` and return its distinct launches on `arch`, without executing them.

    Triton itself binds and specializes the arguments, so the rules are those of the installed
    version. Tensors may be on the CPU, or on "meta", where large ones cost no memory.
    """
    launches: dict[tuple[str, int, str], Launch] = {}

    def take_down(fn, key, signature, device, constexprs, options, attrs, warmup) -> None:
        launch = Launch(fn, arch, key, signature, constexprs, attrs, dict(options.__dict__))
        # When it gets no kernel, `JITFunction.run` returns before launching.
        launches.setdefault(launch.identity, launch)

    with (
        mock.patch.object(driver, "_active", _Device(arch)),
        mock.patch.object(JITFunction, "_do_compile", take_down),
    ):
        function()
    return list(launches.values())


def _find(module: str, name: str) -> JITFunction:
    return attrgetter(name)(importlib.import_module(module))


# Kernels are passed to the worker processes by name.
copyreg.pickle(JITFunction, lambda fn: (_find, (fn.__module__, fn.__qualname__)))


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The function's value, or its error as a string."""
    try:
        return function(*args)
    except Exception as error:
        # Triton wraps what went wrong inside a kernel in a CompilationError about its call.
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        # The error of a failing ptxas contains all of its input.
        return "\ncaused by ".join(f"{type(each).__name__}: {each}"[:2000] for each in causes)


def _compile_and_keep(launch: Launch, cache: Cache) -> Report:
    """In a worker: results are kept even if the run is stopped."""
    report = compile_launch(launch)
    cache.write(launch, asdict(report))
    return report


def _compile_all(launches: list[Launch], jobs: int, cache: Cache) -> list[Report | str]:
    """Reports, or error messages, in order."""

    def pool(workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    futures = []
    with pool(jobs) as workers, contextlib.suppress(BrokenProcessPool):
        for launch in launches:
            futures.append(workers.submit(_attempt, _compile_and_keep, launch, cache))
    results = []
    for launch, future in itertools.zip_longest(launches, futures):
        # LLVM aborts instead of raising, and other launches in the process are lost.
        if future is None or isinstance(future.exception(), BrokenProcessPool):
            with pool(1) as worker:
                future = worker.submit(_attempt, _compile_and_keep, launch, cache)
        broken = isinstance(future.exception(), BrokenProcessPool)
        crash = "the compiler crashed (its messages are on stderr)"
        results.append(crash if broken else future.result())
    return results


def _compile_new(launches: list[Launch], jobs: int, cache: Cache) -> list[Report | str]:
    """Like `_compile_all`, but only for launches that are not in the cache."""
    known = [cache.read(launch) for launch in launches]
    new = [launch for launch, report in zip(launches, known, strict=True) if report is None]
    compiled = iter(_compile_all(new, jobs, cache) if new else ())
    return [next(compiled) if report is None else Report(**report) for report in known]


Recorded = dict[tuple[str, int], "list[Launch] | str"]


def _thinned(recorded: Recorded, every: int, whole_cases: Collection[str]) -> dict[str, Launch]:
    """One of `every` distinct launches of each kernel for each arch, and all of some cases."""
    kept, seen, counts = {}, set(), collections.Counter()
    for (case, arch), launches in recorded.items():
        for launch in () if isinstance(launches, str) else launches:
            if case in whole_cases:
                kept[launch.identity] = launch
            if launch.identity in seen:
                continue
            seen.add(launch.identity)
            if counts[arch, launch.fn] % every == 0:
                kept[launch.identity] = launch
            counts[arch, launch.fn] += 1
    return kept


def check(
    module: Any,
    archs: tuple[int, ...] = ARCHS,
    jobs: int | None = None,
    cache: Path | None = None,
    every: int = 1,
) -> list[dict]:
    """Record and compile the cases of a module; identical launches are compiled once. Launches that
    `every` leaves out are reported as "left_out".
    """
    recorded = {
        (case, arch): _attempt(record, lambda f=f, a=arch: f(a), arch)
        for case, f in module.CASES.items()
        for arch in archs
    }
    expects = dict(getattr(module, "EXPECTS", {}))
    unique = _thinned(recorded, every, getattr(module, "NEVER_LEFT_OUT", ()))
    results = _compile_new([*unique.values()], jobs or os.cpu_count(), Cache(cache))
    compiled = dict(zip(unique, results, strict=True))
    reports, met = [], set()
    for (case, arch), launches in recorded.items():
        if isinstance(launches, str):
            reports.append({"case": case, "arch": arch, "error": launches})
            continue
        for launch in launches:
            name = launch.fn.__name__
            about = {"case": case, "arch": arch, "kernel": name}
            if launch.identity not in compiled:
                reports.append({**about, "left_out": True})
                continue
            result = compiled[launch.identity]
            if isinstance(result, str):
                reports.append({**about, "arguments": launch.arguments, "error": result})
                continue
            met.add(f"{case}:{name}")
            wanted = expects.get(f"{case}:{name}", {}).get(arch, ())
            missing = [each for each in wanted if each not in result.instructions]
            reports.append({**asdict(result), "case": case, "missing": missing})
    if every > 1 or set(archs) != set(ARCHS):
        return reports  # further faults may concern the others
    for case in module.CASES:
        if not any(recorded[case, arch] for arch in archs):
            error = "the case launches no kernel on any arch"
            reports.append({"case": case, "arch": None, "error": error})
    for unmet in sorted(expects.keys() - met):
        error = f"EXPECTS names {unmet}, which compiled on none of the archs"
        reports.append({"case": unmet.partition(":")[0], "arch": None, "error": error})
    return reports


def main() -> None:
    """Print the reports on a cases module as one JSON list, or write the table of resources."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases_module", nargs="?", default="tests.triton_kernels.aot_cases")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--every", type=int, default=1, help="compile one of so many launches")
    parser.add_argument("--cache", type=Path, help="a folder to keep results in")
    parser.add_argument("--table", action="store_true", help=f"write {aot_table.TABLE.name} anew")
    arguments = parser.parse_args()
    if knobs.runtime.interpret:
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    archs = ARCHS if arguments.table else tuple(arguments.arch)
    # Triton prints the log of a failing ptxas: keep standard output for the reports.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with output, tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # inherited by workers: nothing is stale
        module = importlib.import_module(arguments.cases_module)
        every = 1 if arguments.table else arguments.every
        reports = check(module, archs, arguments.jobs, arguments.cache, every)
        if arguments.table:
            aot_table.write(reports)
        else:
            json.dump(reports, output, indent=1)


if __name__ == "__main__":
    main()
