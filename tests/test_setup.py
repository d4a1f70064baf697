"""setup.py: where it finds CUDA, and what it reports to have built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from .support import ROOT

pytest.importorskip("setuptools", reason="setup.py needs setuptools")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# Runs setup.py up to its call of setup(), and then the last step of its build_ext, in a fork a
# case: torch, whose import takes longest, looks for CUDA when its cpp_extension is imported.
PROGRAM = """
import json, os, runpy, sys
import setuptools, torch, torch.cuda

def setup(ext_modules, cmdclass):
    (extension,) = ext_modules
    print("cuda sources:", any(s.endswith(".cu") for s in extension.sources))
    print("include:", *extension.include_dirs)
    print("archs:", os.environ.get("TORCH_CUDA_ARCH_LIST"))
    from torch.utils.cpp_extension import BuildExtension
    BuildExtension.run = lambda self: None
    object.__new__(cmdclass["build_ext"]).run()

setuptools.setup = setup
torch._C._cuda_getDeviceCount = lambda: 0
for name, case in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        output = os.open(case["output"], os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ.update(case["environment"])
        torch.version.cuda = case["cuda"]
        torch.cuda._is_compiled = lambda: case["cuda"] is not None
        if not case["found"]:
            import torch.utils.cpp_extension
            torch.utils.cpp_extension.CUDA_HOME = None
        runpy.run_path("setup.py", run_name="__main__")
        sys.exit(0)
    status = os.waitpid(child, 0)[1]
    with open(case["output"], "a") as file:
        file.write(f"status {os.waitstatus_to_exitcode(status)}\\n")
"""


@dataclass
class Case:
    """`cuda`: torch's CUDA version if it is a CUDA build; `found`: whether nvcc exists; `archs`:
    what TORCH_CUDA_ARCH_LIST says. There is no GPU.
    """

    cuda: str | None
    choice: str = "auto"
    found: bool = True
    home: str = ""
    archs: str = ""


CASES = {
    "wrapper": Case("13.0", "cuda"),
    "given home": Case("13.0", home="/a/given/home"),
    "older": Case("12.6"),
    "given archs": Case("13.0", archs="9.0"),
    "no nvcc": Case("13.0", found=False),
    "no nvcc, but wanted": Case("13.0", "cuda", found=False),
    "cpu": Case(None),
    "cpu, but wanted": Case(None, "cuda"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The CUDA_HOME of an nvcc that is called by a script named nvcc on the PATH."""
    folder = tmp_path_factory.mktemp("setup")
    home, path = folder / "cuda-13.0", folder / "usr/bin"
    for tool in (path / "nvcc", home / "bin/nvcc"):
        tool.parent.mkdir(parents=True)
    (home / "bin/nvcc").write_text(
        '#!/bin/sh\nhere=$(dirname "$0")\n'
        'case "$*" in *-dryrun*) echo "#$ _SPACE_= " >&2; echo "#$ TOP=$here/.." >&2;; esac\n'
    )
    (path / "nvcc").write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    for tool in (path / "nvcc", home / "bin/nvcc"):
        tool.chmod(0o755)
    return home


@pytest.fixture(scope="module")
def said(home) -> dict[str, str]:
    """setup.py's output, by case."""
    folder = home.parent
    others = ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
    kept = {k: v for k, v in os.environ.items() if k not in others} | {"OMP_NUM_THREADS": "1"}
    given = {}
    for name, case in CASES.items():
        path = f"{folder}/usr/bin:/usr/bin:/bin" if case.found else "/nowhere"
        environment = {"PATH": path, "LORA_KERNELS_BUILD": case.choice}
        environment |= {"CUDA_HOME": case.home} if case.home else {}
        environment |= {"TORCH_CUDA_ARCH_LIST": case.archs} if case.archs else {}
        output = str(folder / f"{name}.txt")
        given[name] = {**vars(case), "environment": environment, "output": output}
    command = [sys.executable, "-c", PROGRAM, json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: Path(case["output"]).read_text() for name, case in given.items()}


def test_home_is_what_nvcc_says(said, home):
    assert "cuda sources: True" in said["wrapper"]
    assert f" {home}/include" in said["wrapper"]
    wanted = f"lora_kernels: built the CPU and CUDA kernels (CUDA_HOME={home})\nstatus 0\n"
    assert said["wrapper"].endswith(wanted)


def test_given_home_stays(said):
    assert "(CUDA_HOME=/a/given/home)" in said["given home"]


@pytest.mark.parametrize(
    ("case", "archs"),
    [
        ("wrapper", "8.0;9.0;10.0+PTX"),
        ("older", "8.0;9.0+PTX"),
        ("given archs", "9.0"),
        ("cpu", "None"),
    ],
)
def test_without_a_gpu_it_compiles_for_those_of_data_centers(case, archs, said):
    """torch alone would fail with an IndexError."""
    assert f"archs: {archs}\n" in said[case]


def test_cpu_kernels_under_a_gpu_torch_are_not_silent(said):
    text = said["no nvcc"]
    assert "cuda sources: False" in text and text.endswith("status 0\n")
    assert "built the CPU kernels only: torch is a CUDA build, but nvcc was not found" in text


def test_a_cpu_torch_builds_cpu_kernels(said):
    assert said["cpu"].endswith("lora_kernels: built the CPU kernels\nstatus 0\n")


@pytest.mark.parametrize(
    ("case", "why"),
    [("no nvcc, but wanted", "nvcc was not found"), ("cpu, but wanted", "is not a CUDA build")],
)
def test_gpu_kernels_that_cannot_be_had_stop_the_build(case, why, said):
    assert "LORA_KERNELS_BUILD=cuda: " in said[case] and why in said[case]
    assert "status 1" in said[case] and "built the" not in said[case]
