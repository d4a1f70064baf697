"""`make gpu` from end to end, with stand-ins for the card, its tools and the parts' programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.card.parts import CALLS, Call

from ..support import ROOT

PARTS = CALLS["first"].names
# Replaces the Python with a CUDA torch, and leaves the files that a part's command would leave.
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, sys, time
words = sys.argv[1:]
line = " ".join(words)
behave = json.loads(os.environ["BEHAVE"])

def note(event, test):
    with open(os.environ["CARD_IDS"], "a") as file:
        file.write(event + "\\t" + test + "\\n")

if "benchmarks.card.facts" in line:
    facts = {{"slug": "stand-in", "xdist": behave.get("xdist", True), "card": "a stand-in"}}
    pathlib.Path(words[-1]).write_text(json.dumps(facts))
    print("card a stand-in, driver 1")
elif "setup.py" in line:
    assert os.environ["LORA_KERNELS_BUILD"] == "cuda"
    print("lora_kernels: built the CPU and CUDA kernels (CUDA_HOME=/cuda)")
    sys.exit(behave.get("build", 0))
elif "-m pytest" in line:
    assert os.environ["OMP_NUM_THREADS"] == os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    print(line)
    note("begin", "tests/a.py::test_good"), note("end", "tests/a.py::test_good")
    if "--ignore=tests/triton_kernels/test_aot.py" in line and behave.get("hang"):
        note("begin", "tests/a.py::test_hangs[x y]")
        os.system("sleep 100 & echo $! >> " + os.environ["CHILDREN"])  # a worker of its own
        time.sleep(100)
    if "cuda and not compile" in line and behave.get("fail"):
        note("begin", "tests/a.py::test_bad"), note("failed", "tests/a.py::test_bad")
        note("end", "tests/a.py::test_bad")
        print("=== 1 failed, 1 passed in 0.1s ===")
        sys.exit(1)
    print("=== 1 passed in 0.1s ===")
elif "benchmarks.gpu" in line and "--out" in line:
    out = pathlib.Path(words[words.index("--out") + 1])
    out.mkdir(parents=True, exist_ok=True)
    (out / (words[2] + ".csv")).write_text("a,b\\n")
    (out / "headline.csv").write_text(
        "line,aim,measured,measured_ms,met,measured_on\\n"
        "forward,<= 1.05 x bare,1.0412345,0.36,yes,2999-01-01 00:00 UTC\\n"
        "decode,<= 1.15 x bare,1.3,0.01,NO,2020-01-01 00:00 UTC\\n"
        "memory,<= 1.02 x bare,,,,\\n"
    )
    print("a table")
    sys.exit(behave.get(words[2], 0))
"""
SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER $*"
while [ "$1" != --error-exitcode ]; do shift; done
code=$2
shift 2
[ "$1" = --report-api-errors ] && shift 2
"$@"
echo "========= ERROR SUMMARY: 2 errors"
exit $code
"""
NCU = """#!/bin/sh
while [ "$1" != --log-file ]; do shift; done
echo "ID,Kernel Name" > "$2"
"""


@pytest.fixture
def stand_ins(tmp_path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("python", PYTHON), ("compute-sanitizer", SANITIZER), ("ncu", NCU)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def start(stand_ins: Path, *options: str, call: str = "first", **behave) -> subprocess.Popen:
    folder = stand_ins.parent
    environment = {**os.environ, "BEHAVE": json.dumps(behave), "CHILDREN": f"{folder}/children"}
    environment |= {"PATH": f"{stand_ins}:/usr/bin:/bin", "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "benchmarks.card", call, "--out", str(folder / "out")]
    command += ["--python", str(stand_ins / "python"), "--results", str(folder / "results")]
    return subprocess.Popen(
        [*command, *options], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def rows_of(output: str, head: str) -> dict[str, list[str]]:
    """The rows of a printed table, by their first cell."""
    lines = output.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(head))
    rows = {}
    for line in lines[begin + 2 :]:
        if "|" not in line:
            break
        first, *cells = (cell.strip() for cell in line.split("|"))
        rows[first] = cells
    return rows


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}


def test_a_whole_call(stand_ins, tmp_path):
    status, output = finish(start(stand_ins, "--minutes", "1", fail=True, layer=3))
    assert status == 1  # a test failed, a section broke, the sanitizers found something
    parts = rows_of(output, "part ")
    assert list(parts) == sorted(PARTS, key=list(parts).index) and len(parts) == len(PARTS)
    assert parts["facts"][0::2] == ["passed", "card a stand-in, driver 1"]
    assert parts["build"][::2] == [
        "passed",
        "lora_kernels: built the CPU and CUDA kernels (CUDA_HOME=/cuda)",
    ]
    assert parts["kernel tests"][0] == "passed"
    assert parts["operator tests"][0::2] == ["FAILED (1)", "1 failed, 1 passed in 0.1s"]
    assert parts["memcheck, layer"][::2] == ["FAILED (86)", "ERROR SUMMARY: 2 errors"]
    assert parts["layer"][0] == "FAILED (3)"
    assert parts["memory"][0] == "passed"  # the parts after a failure still run

    headline = rows_of(output, "headline ")
    assert headline["forward"] == ["<= 1.05 x bare", "1.041", "yes"]
    assert headline["decode"][1] == "1.3 (earlier: 2020-01-01 00:00 UTC)"
    assert headline["memory"][1] == "not measured"
    assert output.rstrip().splitlines()[-1].startswith("memory")  # the table comes last

    out = tmp_path / "out"
    assert len(list(out.iterdir())) <= 8
    assert (out / "report.txt").read_text().strip() in output
    assert (out / "failed.txt").read_text() == "tests/a.py::test_bad\n"
    known = json.loads((out / "run.json").read_text())
    assert known["facts"]["card"] == "a stand-in"
    assert {part["part"] for part in known["parts"]} == set(PARTS)
    logs = read_tar(out / "logs.tar.gz")
    assert b"-n " in logs["operator-tests.log"] and b"no:xdist" in logs["memcheck-layer.log"]
    assert b"--report-api-errors no" in logs["memcheck-layer.log"]
    # It can be unpacked in the repository.
    assert "benchmarks/results/stand-in/memory.csv" in read_tar(out / "results.tar")
    assert not list(tmp_path.glob("card-*"))  # nothing is left behind


def test_without_xdist(stand_ins, tmp_path):
    old = tmp_path / "results/nvidia-old/layer.csv"
    old.parent.mkdir(parents=True)
    old.write_text("of another day")
    options = ("--minutes", "1", "--only", "operator tests")
    status, output = finish(start(stand_ins, *options, xdist=False))
    assert status == 0
    assert list(rows_of(output, "part ")) == ["facts", "operator tests"]
    assert read_tar(tmp_path / "out/results.tar") == {}  # nothing is new
    log = read_tar(tmp_path / "out/logs.tar.gz")["operator-tests.log"]
    assert b" -n " not in log and b"no:xdist" not in log


def test_a_part_that_hangs_is_stopped_and_named(stand_ins, tmp_path):
    # Of nine minutes a part has 150 s; of 0.3 it has 5.
    options = ("--minutes", "0.3", "--only", "kernel tests", "operator tests")
    status, output = finish(start(stand_ins, *options, hang=True))
    assert status == 1
    parts = rows_of(output, "part ")
    assert parts["kernel tests"][0] == "STOPPED at 5 s"
    assert parts["operator tests"][0] == "passed"
    assert (tmp_path / "out/failed.txt").read_text() == "tests/a.py::test_hangs[x y]\n"
    (child,) = map(int, (tmp_path / "children").read_text().split())
    assert not running(child)  # its workers end too


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_call_that_is_killed_leaves_what_it_had(number, stand_ins, tmp_path):
    process = start(stand_ins, "--only", "ceilings", "kernel tests", hang=True)
    failed = tmp_path / "out/failed.txt"
    children = tmp_path / "children"
    deadline = time.monotonic() + 30
    while not children.is_file() or not failed.is_file():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    groups = {os.getpgid(int(pid)) for pid in children.read_text().split() if running(int(pid))}
    for group in groups:  # a killed call cannot end them; its caller can
        assert number == signal.SIGKILL
        os.killpg(group, signal.SIGKILL)
    out = tmp_path / "out"
    assert len(list(out.iterdir())) <= 8
    assert b"card a stand-in" in read_tar(out / "logs.tar.gz")["facts.log"]
    read_tar(out / "results.tar")
    assert json.loads((out / "run.json").read_text())["parts"][0]["result"] == "passed"
    if number == signal.SIGTERM:
        assert rows_of(output, "part ")["kernel tests"][0] == "stopped: the call was ended"
        assert "tests/a.py::test_hangs[x y]" in failed.read_text()


def test_the_second_call(stand_ins, tmp_path):
    ids = tmp_path / "ids"
    ids.write_text("# of the first call\ntests/a.py::test_bad[a b]\n\ntests/b.py::test_worse\n")
    options = ("--minutes", "1", "--tests", str(ids))
    status, output = finish(start(stand_ins, *options, call="again"))
    assert status == 1
    parts = rows_of(output, "part ")
    assert set(parts) == set(CALLS["again"].names)
    assert {parts[f"{tool}, layer"][0] for tool in ("synccheck", "racecheck")} == {"FAILED (86)"}
    logs = read_tar(tmp_path / "out/logs.tar.gz")
    assert b"tests/a.py::test_bad[a b] tests/b.py::test_worse" in logs["named-tests.log"]
    assert b"-k cuda and compile" in logs["compile-tests.log"]
    results = read_tar(tmp_path / "out/results.tar")
    assert results["benchmarks/results/stand-in/ncu.csv"] == b"ID,Kernel Name\n"


def test_tools_that_are_missing_are_said(stand_ins):
    (stand_ins / "compute-sanitizer").unlink()
    options = ("--minutes", "1", "--only", "memcheck, layer")
    status, output = finish(start(stand_ins, *options))
    assert status == 0
    assert rows_of(output, "part ")["memcheck, layer"][0] == "not run: no compute-sanitizer here"


def test_facts_are_one_line_and_a_file(stand_ins, tmp_path):
    smi = stand_ins / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB, 580.1'\n")
    smi.chmod(0o755)
    path = tmp_path / "facts.json"
    command = [sys.executable, "-m", "benchmarks.card.facts", str(path)]
    environment = {**os.environ, "PATH": f"{stand_ins}:/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    known = json.loads(path.read_text())
    assert done.stdout.startswith("card NVIDIA H200, 143771 MiB, 580.1, python 3.")
    assert len(done.stdout.splitlines()) == 1
    assert known["torch"] in done.stdout and isinstance(known["xdist"], bool)
    assert (known["slug"] == "no-gpu") == (done.returncode == 1)


def test_tests_run_while_the_extension_is_being_built(tmp_path):
    call = Call(sys.executable, tmp_path, tmp_path, (), 2)
    options = call.pytest("tests/layers/test_options.py", "-k", "not gpu")[3:]
    program = "import sys, pytest; sys.modules['lora_kernels._C'] = None; "
    program += f"sys.exit(pytest.main({options!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


TESTS = """
import pytest, os
def test_good(): pass
def test_bad(): assert False
@pytest.fixture
def broken(): raise OSError
def test_error(broken): pass
@pytest.mark.parametrize("x", ["a b"])
def test_crash(x): os._exit(1)
"""


@pytest.mark.parametrize("parallel", [True, False])
def test_failing_tests_are_noted_by_name(parallel, tmp_path):
    if parallel:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("raise ValueError")
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.card.pytest_ids", "-q"]
    command += ["-c", os.devnull, "--rootdir", str(tmp_path), "-p", "no:cacheprovider"]
    command += ["-p", "xdist.plugin", "-n", "1"] if parallel else []
    command += ["--continue-on-collection-errors", str(tmp_path)]
    ids = tmp_path / "ids"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CARD_IDS": str(ids)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # most of the time goes into importing them
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60)
    events = [line.split("\t") for line in ids.read_text().splitlines()]
    failed = [test for event, test in events if event == "failed"]
    assert {"test_some.py::test_bad", "test_some.py::test_error", "test_broken.py"} <= set(failed)
    begun = [test for event, test in events if event == "begin"]
    assert begun.count("test_some.py::test_crash[a b]") == 1
    if parallel:  # the worker's end is its test's failure
        assert "test_some.py::test_crash[a b]" in failed
    else:
        assert "test_some.py::test_crash[a b]" not in {t for e, t in events if e == "end"}
    assert "test_some.py::test_good" not in failed
