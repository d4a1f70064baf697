"""setup.py: where it finds CUDA, and what it says that it built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("setuptools", reason="setup.py needs setuptools")

# Runs setup.py up to its call of setup(), with a torch that is a CUDA build or none, and then the
# last step of its build_ext. Another process: torch looks for CUDA once, when it is imported.
PROGRAM = """
import runpy, setuptools, torch, torch.cuda
torch.version.cuda = {cuda!r}
torch.cuda._is_compiled = lambda: {cuda!r} != None
torch._C._cuda_getDeviceCount = lambda: 0
def setup(ext_modules, cmdclass):
    (extension,) = ext_modules
    print("cuda sources:", any(s.endswith(".cu") for s in extension.sources))
    print("include:", *extension.include_dirs)
    from torch.utils.cpp_extension import BuildExtension
    BuildExtension.run = lambda self: None
    command = object.__new__(cmdclass["build_ext"])
    command.run()
setuptools.setup = setup
runpy.run_path("setup.py", run_name="__main__")
"""


NO_CUDA = "import torch.utils.cpp_extension\ntorch.utils.cpp_extension.CUDA_HOME = None\n"


def run_setup(
    cuda: str | None, path: str, then: str = "", **environment: str
) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    kept |= {"PATH": path, "OMP_NUM_THREADS": "1", "TORCH_CUDA_ARCH_LIST": "9.0", **environment}
    program = PROGRAM.format(cuda=cuda).replace("def setup(", then + "def setup(")
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)


@pytest.fixture
def wrapper(tmp_path) -> tuple[Path, Path]:
    """(the folder of an nvcc that is a script, the CUDA_HOME that the script's nvcc belongs to)."""
    home, folder = tmp_path / "cuda-13.0", tmp_path / "usr/bin"
    for tool in (folder / "nvcc", home / "bin/nvcc"):
        tool.parent.mkdir(parents=True)
    (home / "bin/nvcc").write_text(
        '#!/bin/sh\nhere=$(dirname "$0")\n'
        'case "$*" in *-dryrun*) echo "#$ _SPACE_= " >&2; echo "#$ TOP=$here/.." >&2;; esac\n'
    )
    (folder / "nvcc").write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    for tool in (folder / "nvcc", home / "bin/nvcc"):
        tool.chmod(0o755)
    return folder, home


def test_home_is_what_nvcc_says(wrapper):
    folder, home = wrapper
    done = run_setup("13.0", f"{folder}:/usr/bin:/bin", LORA_KERNELS_BUILD="cuda")
    assert done.returncode == 0, done.stderr
    assert "cuda sources: True" in done.stdout
    assert f" {home}/include" in done.stdout
    assert f"lora_kernels: built the CPU and CUDA kernels (CUDA_HOME={home})" in done.stdout


def test_given_home_stays(wrapper, tmp_path):
    done = run_setup("13.0", f"{wrapper[0]}:/usr/bin:/bin", CUDA_HOME=str(tmp_path))
    assert f"CUDA_HOME={tmp_path})" in done.stdout, done.stderr


@pytest.mark.parametrize(("choice", "code"), [("auto", 0), ("cuda", 1)])
def test_cpu_kernels_under_a_gpu_torch_are_not_silent(choice, code, tmp_path):
    done = run_setup("13.0", f"{tmp_path}:/usr/bin:/bin", NO_CUDA, LORA_KERNELS_BUILD=choice)
    assert done.returncode == code, done.stderr
    if choice == "auto":
        assert "cuda sources: False" in done.stdout
        assert "built the CPU kernels only: torch is a CUDA build, but nvcc was not" in done.stdout
    else:
        assert "LORA_KERNELS_BUILD=cuda: nvcc was not found" in done.stderr


def test_a_cpu_torch_builds_cpu_kernels(wrapper):
    done = run_setup(None, f"{wrapper[0]}:/usr/bin:/bin")
    assert done.stdout.endswith("lora_kernels: built the CPU kernels\n"), done.stderr


def test_gpu_kernels_that_cannot_be_had_stops_the_build(wrapper):
    done = run_setup(None, f"{wrapper[0]}:/usr/bin:/bin", LORA_KERNELS_BUILD="cuda")
    assert done.returncode != 0 and "is no CUDA build" in done.stderr
