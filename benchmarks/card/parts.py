"""The parts of both calls: their commands, their time limits, and which run at the same time."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from benchmarks.card.pack import read_facts

# Tests that do not use the GPU, or need packages and files that a GPU machine may lack.
ELSEWHERE = ("csrc", "peft", "files", "triton_kernels")
AHEAD = "tests/triton_kernels/test_aot.py"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
# Seconds that a benchmark needs after its last measurement, for the CSV file and the plot.
CLOSING = 10.0


@dataclass(frozen=True)
class Call:
    """The values from which the commands of the parts are made."""

    python: str
    work: Path
    results: Path
    tests: tuple[str, ...]
    cpus: int

    @property
    def workers(self) -> int:
        """The number of pytest-xdist's workers: 12 on 16 cores."""
        return max(2, min(12, 3 * self.cpus // 4))

    @cached_property
    def facts(self) -> dict:
        """The facts from `benchmarks.card.facts`; the part `facts` has to run first."""
        return read_facts(self.work)

    @property
    def folder(self) -> Path:
        """The folder of this GPU's results."""
        return self.results / self.facts.get("slug", "unknown-gpu")

    def headline(self) -> list[dict[str, str]]:
        """The rows of headline.csv; none before the first benchmark has ended."""
        path = self.folder / "headline.csv"
        if not path.is_file():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def pytest(self, *arguments: str, workers: int = 0) -> list[str]:
        """A pytest command that records every test; parallel if xdist is installed."""
        command = [self.python, "-m", "pytest", "-p", "benchmarks.card.pytest_ids", "-q", "-rfE"]
        command += ["--tb=short", "--durations=10", "-p", "no:cacheprovider"]
        # The extension may not be built yet, and pyproject.toml turns this warning into an error.
        command += ["-W", "ignore:lora_kernels runs without its compiled:RuntimeWarning"]
        if self.facts.get("xdist"):
            # Not --dist loadgroup, with which a run hangs after a worker has crashed (xdist 3.8).
            parallel = ["-n", str(workers), "--dist", "load"]
            command += parallel if workers > 1 else ["-p", "no:xdist"]
            if workers > 1 and self.facts.get("pytest_timeout"):
                # A kernel that hangs ends its worker, and xdist starts another.
                command += ["--timeout", "75", "--timeout-method", "thread"]
        return [*command, *arguments]


Command = Callable[[Call, float], "list[str] | None"]


@dataclass(frozen=True)
class Part:
    """One part; `limit` is in seconds, for a call with the default number of minutes."""

    name: str
    limit: float
    command: Command  # takes the call and the seconds available; None means nothing to do
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # the name of a program


@dataclass(frozen=True)
class Definition:
    """One call. Its stages run one after another; the parts of a stage run at the same time."""

    minutes: float
    stages: tuple[tuple[Part, ...], ...]

    @property
    def names(self) -> list[str]:
        """The names of all parts."""
        return [part.name for stage in self.stages for part in stage]


ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
# torch's caching allocator would hide accesses past the end of a tensor, and measuring which
# variant of a kernel is fastest takes long under a sanitizer.
SANITIZED = {**ONE_THREAD, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "LORA_KERNELS_TUNE": "0"}


def facts(call: Call, seconds: float) -> list[str]:
    """Find the GPU and the versions."""
    return [call.python, "-m", "benchmarks.card.facts", str(call.work / "facts.json")]


def build(call: Call, seconds: float) -> list[str]:
    """Build the extension in place; an error if CUDA is not found."""
    return [call.python, "setup.py", "--quiet", "build_ext", "--inplace"]


def on_cuda(which: str) -> Command:
    """The tests selected by `-k which`, outside `ELSEWHERE`."""

    def command(call: Call, seconds: float) -> list[str]:
        ignored = [f"--ignore=tests/{name}" for name in ELSEWHERE]
        return call.pytest("-k", which, *ignored, "tests", workers=call.workers)

    return command


def kernels(call: Call, seconds: float) -> list[str]:
    """The tests of the Triton kernels."""
    return call.pytest(f"--ignore={AHEAD}", "tests/triton_kernels", workers=call.workers)


def ahead_of_time(call: Call, seconds: float) -> list[str]:
    """The ahead-of-time tests, in one process because they share a fixture that compiles."""
    return call.pytest(AHEAD)


def sanitize(tool: str, *selected: str) -> Command:
    """The tests marked `sanitize`, under one tool of compute-sanitizer."""

    def command(call: Call, seconds: float) -> list[str]:
        sanitizer = ["compute-sanitizer", "--target-processes", "application-only"]  # not ptxas
        sanitizer += ["--tool", tool, "--error-exitcode", "86"]
        # torch makes some calls only to see whether they fail; those are not errors of a kernel.
        sanitizer += ["--report-api-errors", "no"] if tool == "memcheck" else []
        return [*sanitizer, *call.pytest("-m", "sanitize", *selected)]

    return command


def bench(section: str) -> Command:
    """One part of `benchmarks.gpu`, which is told to end before its limit."""

    def command(call: Call, seconds: float) -> list[str]:
        minutes = max(seconds - CLOSING, seconds / 2) / 60
        options = ["--minutes", f"{minutes:.3f}", "--out", str(call.folder)]
        return [call.python, "-m", "benchmarks.gpu", section, *options]

    return command


def named_tests(call: Call, seconds: float) -> list[str] | None:
    """The tests named in the file TESTS."""
    return call.pytest(*call.tests, workers=call.workers) if call.tests else None


def profile(call: Call, seconds: float) -> list[str]:
    """Hardware counters of six kernels, without changing the GPU's clocks."""
    call.folder.mkdir(parents=True, exist_ok=True)
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    ncu += [word for name in SECTIONS for word in ("--section", name)]
    ncu += ["--csv", "--log-file", str(call.folder / "ncu.csv")]
    return [*ncu, call.python, "-m", "benchmarks.gpu.profile"]


LAYER = ("tests/triton_kernels/test_sanitized.py", "tests/triton_kernels/test_grouped.py")
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
            (Part("experts", 35, bench("experts")),),
            (Part("sharded", 60, bench("sharded")),),
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
