"""The parts of both calls: what runs, for how long, and what runs beside it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from benchmarks.card.pack import read_facts

# Tests that never touch the device, or want packages and files that such a machine lacks.
ELSEWHERE = ("csrc", "peft", "files", "triton_kernels")
AHEAD = "tests/triton_kernels/test_aot.py"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
# What the bench needs after its last figure: the CSV, the picture, the end of the process.
CLOSING = 10.0


@dataclass(frozen=True)
class Call:
    """What the parts' commands are made of."""

    python: str
    work: Path
    results: Path
    tests: tuple[str, ...]
    cpus: int

    @property
    def workers(self) -> int:
        """For pytest-xdist: 12 of 16."""
        return max(2, min(12, 3 * self.cpus // 4))

    @cached_property
    def facts(self) -> dict:
        """What `benchmarks.card.facts` found, once it has run."""
        return read_facts(self.work)

    @property
    def folder(self) -> Path:
        """Of this card's results."""
        return self.results / self.facts.get("slug", "unknown-gpu")

    def headline(self) -> list[dict[str, str]]:
        """The rows of headline.csv; none before the first part of the bench has ended."""
        path = self.folder / "headline.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def pytest(self, *arguments: str, workers: int = 0) -> list[str]:
        """A run that notes every test (`pytest_ids`), in workers where xdist is installed."""
        command = [self.python, "-m", "pytest", "-p", "benchmarks.card.pytest_ids", "-q", "-rfE"]
        command += ["--tb=short", "--durations=10", "-p", "no:cacheprovider"]
        # The extension may still be in the making: pyproject.toml turns this warning into an error.
        command += ["-W", "ignore:lora_kernels runs without its compiled:RuntimeWarning"]
        if self.facts.get("xdist"):
            # Not --dist loadgroup: with it a run hangs once a worker has crashed (xdist 3.8).
            parallel = ["-n", str(workers), "--dist", "load"]
            command += parallel if workers > 1 else ["-p", "no:xdist"]
            if workers > 1 and self.facts.get("pytest_timeout"):
                # A kernel that hangs takes its worker with it, and xdist starts another.
                command += ["--timeout", "75", "--timeout-method", "thread"]
        return [*command, *arguments]


Command = Callable[[Call, float], "list[str] | None"]


@dataclass(frozen=True)
class Part:
    """`limit` is in seconds, of a call that takes the minutes it is meant to."""

    name: str
    limit: float
    command: Command  # of the call and of the seconds that it has; None: nothing to do
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a program


@dataclass(frozen=True)
class Definition:
    """Stages follow each other; the parts of a stage run side by side."""

    minutes: float
    stages: tuple[tuple[Part, ...], ...]

    @property
    def names(self) -> list[str]:
        """Of all parts."""
        return [part.name for stage in self.stages for part in stage]


ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
# torch's cache hides the ends of tensors; measuring which way is fastest takes long.
SANITIZED = {**ONE_THREAD, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LORA_KERNELS_TUNE": "0"}


def facts(call: Call, seconds: float) -> list[str]:
    """The card, the versions."""
    return [call.python, "-m", "benchmarks.card.facts", str(call.work / "facts.json")]


def build(call: Call, seconds: float) -> list[str]:
    """In place; fails where CUDA is not found."""
    return [call.python, "setup.py", "--quiet", "build_ext", "--inplace"]


def on_cuda(which: str) -> Command:
    """The tests whose parameters name the device."""

    def command(call: Call, seconds: float) -> list[str]:
        ignored = [f"--ignore=tests/{name}" for name in ELSEWHERE]
        return call.pytest("-k", which, *ignored, "tests", workers=call.workers)

    return command


def kernels(call: Call, seconds: float) -> list[str]:
    """The Triton kernels' own tests."""
    return call.pytest(f"--ignore={AHEAD}", "tests/triton_kernels", workers=call.workers)


def ahead_of_time(call: Call, seconds: float) -> list[str]:
    """In one process: its tests share what a fixture compiles."""
    return call.pytest(AHEAD)


def sanitize(tool: str, *selected: str) -> Command:
    """Tests that are small enough, under one tool of compute-sanitizer."""

    def command(call: Call, seconds: float) -> list[str]:
        sanitizer = ["compute-sanitizer", "--target-processes", "application-only"]  # not ptxas
        sanitizer += ["--tool", tool, "--error-exitcode", "86"]
        # Calls that torch makes to see whether they fail are no errors of a kernel.
        sanitizer += ["--report-api-errors", "no"] if tool == "memcheck" else []
        return [*sanitizer, *call.pytest("-m", "sanitize", *selected)]

    return command


def bench(section: str) -> Command:
    """One section, told to end before it is stopped."""

    def command(call: Call, seconds: float) -> list[str]:
        minutes = max(seconds - CLOSING, seconds / 2) / 60
        options = ["--minutes", f"{minutes:.3f}", "--out", str(call.folder)]
        return [call.python, "-m", "benchmarks.gpu", section, *options]

    return command


def named_tests(call: Call, seconds: float) -> list[str] | None:
    """Those of the file TESTS."""
    return call.pytest(*call.tests, workers=call.workers) if call.tests else None


def profile(call: Call, seconds: float) -> list[str]:
    """Hardware counters of six kernels; the clocks stay as they are."""
    call.folder.mkdir(parents=True, exist_ok=True)
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    ncu += [word for name in SECTIONS for word in ("--section", name)]
    ncu += ["--csv", "--log-file", str(call.folder / "ncu.csv")]
    return [*ncu, call.python, "-m", "benchmarks.gpu.profile"]


LAYER = ("tests/triton_kernels/test_sanitized.py",)
OPERATORS = ("-k", "cuda", "tests/ops", "tests/layers/test_linear.py")
BUILD = {"LORA_KERNELS_BUILD": "cuda"}

CALLS = {
    "first": Definition(
        9.0,
        (
            (Part("facts", 45, facts),),
            (
                Part("build", 150, build, {**BUILD, "MAX_JOBS": "8"}),
                Part("kernel tests", 150, kernels, ONE_THREAD),
                Part("ahead of time", 150, ahead_of_time, ONE_THREAD),
            ),
            (
                Part("operator tests", 140, on_cuda("cuda and not compile"), ONE_THREAD),
                Part(
                    "memcheck, layer", 140, sanitize("memcheck", *LAYER), SANITIZED,
                    "compute-sanitizer",
                ),
                Part(
                    "memcheck, operators", 140, sanitize("memcheck", *OPERATORS), SANITIZED,
                    "compute-sanitizer",
                ),
            ),
            (Part("ceilings", 25, bench("ceilings")),),
            (Part("init", 35, bench("init")),),
            (Part("operators", 35, bench("operators")),),
            (Part("layer", 70, bench("layer")),),
            (Part("decode", 45, bench("decode")),),
            (Part("memory", 30, bench("memory")),),
        ),
    ),
    "again": Definition(
        5.0,
        (
            (Part("facts", 45, facts),),
            (Part("build", 100, build, BUILD),),
            (Part("named tests", 60, named_tests, ONE_THREAD),),
            (
                Part("compile tests", 70, on_cuda("cuda and compile"), ONE_THREAD),
                *(
                    Part(
                        f"{tool}, {what}", 70, sanitize(tool, *tests), SANITIZED,
                        "compute-sanitizer",
                    )
                    for tool in ("synccheck", "racecheck")
                    for what, tests in (("layer", LAYER), ("operators", OPERATORS))
                ),
            ),
            (Part("svd", 40, bench("svd")),),
            (Part("grid", 60, bench("grid")),),
            (Part("ncu", 45, profile, needs="ncu"),),
        ),
    ),
}  # fmt: skip
