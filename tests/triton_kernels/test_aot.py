"""Every kernel compiles for every arch, without spills and within its shared memory (`aot`).

Results are kept in `.cache/triton-aot`: a second run compiles only what has changed.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip(
    "triton", reason="compiling the kernels needs triton (pip install triton)"
)

from ..support import ROOT  # noqa: E402
from ..support.exhaustive import ALL_KERNELS, EXHAUSTIVE  # noqa: E402
from . import aot_table  # noqa: E402

# The limit of a block, which Triton checks only when loading the kernel on the device.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
ARCHS = sorted(SHARED_LIMIT)


def _own_archs() -> list[int]:
    """On a GPU its own arch, for which its Triton compiles; otherwise Hopper's, or all of them."""
    if not torch.cuda.is_available():
        return ARCHS if EXHAUSTIVE else [90]
    major, minor = torch.cuda.get_device_capability()
    return [arch for arch in ARCHS if arch == 10 * major + minor]


OWN_ARCHS = _own_archs()
EVERY = 1 if ALL_KERNELS else 3  # launches of each kernel, the first of them included


def _run(cases_module: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    # In another process: this one may already have imported the kernels for the interpreter.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if not environment.get("TRITON_INTERPRET"):
        environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.triton_kernels.aot", cases_module, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _reports(cases_module: str, archs: list[int], every: int = 1) -> list[dict]:
    folder = ROOT / ".cache" / "triton-aot"
    folder.mkdir(parents=True, exist_ok=True)
    options = ("--cache", str(folder), "--every", str(every), "--arch", *map(str, archs))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other pytest-xdist workers wait, then read the cache
        process = _run(cases_module, *options, TRITON_INTERPRET="")
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    return _reports("tests.triton_kernels.aot_cases", OWN_ARCHS or ARCHS, EVERY)


@pytest.fixture(scope="module")
def probes() -> list[dict]:
    return _reports("tests.triton_kernels.aot_probes", ARCHS)


def _faults(reports: list[dict]) -> list[dict]:
    """The faulty reports, and what is wrong with them."""
    faults = []
    for report in reports:
        aspects = ("error", "missing", "stack", "remarks")
        wrong = {name: report[name] for name in aspects if report.get(name)}
        if report.get("shared", 0) > SHARED_LIMIT.get(report["arch"], 0):
            wrong["shared"] = report["shared"]
        if wrong:
            about = {k: report[k] for k in ("case", "arch", "kernel", "arguments") if k in report}
            faults.append(about | wrong)
    return faults


def test_every_kernel_compiles(kernels):
    assert kernels
    faults = [fault for fault in _faults(kernels) if "error" in fault]
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize("arch", OWN_ARCHS)
@pytest.mark.parametrize("aspect", ["stack", "shared", "missing", "remarks"])
def test_no_kernel_spills_or_overflows_or_lacks_instructions_or_serializes(kernels, arch, aspect):
    assert any(report["arch"] == arch for report in kernels)
    faults = [fault for fault in _faults(kernels) if fault["arch"] == arch and aspect in fault]
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize("arch", [arch for arch in OWN_ARCHS if arch >= 90])
def test_overlapped_kernels_find_room_beside_each_other(kernels, arch):
    reports = [r for r in kernels if r["case"] == "overlapped" and r["arch"] == arch]
    pairs = [(r, s) for r in reports for s in reports if r["kernel"] < s["kernel"]]
    ranks = {tuple(r["arguments"]["BLOCK_R"] for r in pair) for pair in pairs}
    assert {("16", "16"), ("32", "32")} <= ranks
    assert all(
        aot_table.fit_together(pair)
        for pair in pairs
        if pair[0]["arguments"]["BLOCK_R"] == pair[1]["arguments"]["BLOCK_R"]
    )


def test_resources_are_those_of_the_table(kernels):
    made_with = {row["triton"] for row in aot_table.read()}
    if made_with != {triton.__version__}:
        pytest.skip(
            f"{aot_table.TABLE.name} is of Triton {made_with}, this is {triton.__version__}"
        )
    found = aot_table.rows(kernels)
    archs = {str(report["arch"]) for report in kernels}
    want = [row for row in aot_table.read() if row["arch"] in archs]
    if any(report.get("left_out") for report in kernels):
        places = {aot_table.place(row) for row in found}
        want = [row for row in want if aot_table.place(row) in places]
    changes = [
        *(f"- {' '.join(row.values())}" for row in want if row not in found),
        *(f"+ {' '.join(row.values())}" for row in found if row not in want),
    ]
    advice = (
        "the kernels are not those of the table. Meant? python -m tests.triton_kernels.aot --table"
    )
    assert not changes, "\n".join((advice, ", ".join(aot_table.COLUMNS), *changes))


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [
        # NVIDIA's occupancy calculator.
        (80, 32, 0, 4, 16),
        (80, 255, 0, 8, 1),
        (80, 128, 166_912, 4, 1),
        (90, 168, 0, 4, 3),
        (90, 64, 114_712, 4, 2),
        (90, 65, 0, 8, 3),
        (100, 16, 0, 1, 32),
    ],
)
def test_programs_of_a_multiprocessor(arch, registers, shared, warps, programs):
    assert aot_table.programs(arch, registers, shared, warps) == programs


def _probe(probes: list[dict], case: str) -> dict[int | None, dict]:
    """The report of `case` by arch."""
    return {report["arch"]: report for report in probes if report["case"] == case}


@pytest.mark.parametrize(
    ("case", "aspect", "archs"),
    [
        ("spill", "stack", {*ARCHS}),
        ("shared", "shared", {*ARCHS}),
        ("dot again", "missing", {90}),
        ("serialized", "remarks", {90}),
        ("raise", "error", {*ARCHS}),
        ("none", "error", {None}),
        ("dot", "error", {None}),  # has expectations for a kernel that it does not launch
        ("newer", "error", set()),
    ],
)
def test_the_gate_finds(probes, case, aspect, archs):
    faults = [fault for fault in _faults(probes) if fault["case"] == case]
    assert {fault["arch"] for fault in faults} == archs
    assert all(aspect in fault for fault in faults)


@pytest.mark.parametrize(("arch", "name"), [(80, "mma.sync"), (90, "wgmma"), (100, "tcgen05")])
def test_the_gate_counts_instructions(probes, arch, name):
    dot, descriptors = (_probe(probes, case)[arch] for case in ("dot", "descriptors"))
    assert {"mma.sync", "wgmma", "tcgen05"} & dot["instructions"].keys() == {name}
    assert name in descriptors["instructions"]
    assert ("tma.load" in descriptors["instructions"]) == (arch >= 90)
    assert "tma.load" not in dot["instructions"]


def test_identical_launches_are_compiled_once(probes):
    # Times would differ.
    assert _probe(probes, "dot")[90]["seconds"] == _probe(probes, "dot again")[90]["seconds"]
    reports = [r for r in probes if r["case"] == "arguments" and r["arch"] == 90]
    assert [r["arguments"]["Bias"] for r in reports] == ["None", "*fp64/16", "*fp64"]


def test_a_second_run_compiles_nothing(probes):
    # Compiled again, the times would differ.
    assert _reports("tests.triton_kernels.aot_probes", ARCHS) == probes


def test_arguments_are_specialized_as_at_run_time(probes):
    arguments = _probe(probes, "arguments")[80]["arguments"]
    assert arguments["size"] == "i32/16"
    assert arguments["one"] == "1"
    assert arguments["wide"] == "i64/16"
    assert arguments["free"] == arguments["unaligned"] == "i32"
    assert arguments["pair"] == "('*u8', 'i32')"


def test_interpreted_kernels_are_refused():
    process = _run("tests.triton_kernels.aot_probes", TRITON_INTERPRET="1")
    assert process.returncode != 0
    assert "TRITON_INTERPRET" in process.stderr
