"""Builds lora_kernels and its extension `lora_kernels._C`.

LORA_KERNELS_BUILD = auto (default) | cpu | cuda | none chooses what is compiled:
auto takes CUDA sources in when there are any, nvcc is found and torch is a CUDA build; one line
says what was built.
Binaries are portable: the instruction set is chosen when the program runs (csrc/cpu/kernels.h).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")


def compiler_flags() -> list[str]:
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-Wno-psabi", "-Wno-unknown-pragmas"]
    # at::parallel_for is serial in a file compiled without OpenMP. Apple's clang has no -fopenmp.
    return flags + (["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"])


def find_cuda_home() -> None:
    """Sets CUDA_HOME to what nvcc itself says. torch takes the folder above nvcc's, which is a
    wrong one where the nvcc on the PATH is a script that calls another.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    command = [nvcc, "-dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if top := re.search(r"^#\$ TOP=(.+)$", said.stdout + said.stderr, re.MULTILINE):
        os.environ["CUDA_HOME"] = str(Path(top[1].strip()).resolve())


def extensions() -> tuple[list, dict]:
    choice = os.environ.get("LORA_KERNELS_BUILD", "auto").lower()
    if choice not in CHOICES:
        raise SystemExit(f"LORA_KERNELS_BUILD={choice!r}: expected one of {', '.join(CHOICES)}")
    if choice == "none":
        return [], {}

    find_cuda_home()
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    csrc = ROOT / "csrc"
    everything = {p for kind in ("*.cpp", "*.cu") for p in csrc.rglob(kind)}
    of_cuda = {p for p in everything if p.suffix == ".cu" or csrc / "cuda" in p.parents}
    sources = sorted(str(p.relative_to(ROOT)) for p in everything - of_cuda)
    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in of_cuda)
    lacks = ""
    if torch.version.cuda is None:
        lacks = f"torch {torch.__version__} is no CUDA build"
    elif CUDA_HOME is None:
        lacks = "nvcc was not found (put it on the PATH, or set CUDA_HOME)"
    if choice == "cuda" and lacks:
        raise SystemExit(f"LORA_KERNELS_BUILD=cuda: {lacks}")
    with_cuda = bool(cuda_sources) and not lacks and choice != "cpu"
    kernels = f"CPU and CUDA kernels (CUDA_HOME={CUDA_HOME})" if with_cuda else "CPU kernels"
    if torch.version.cuda is not None and choice == "auto" and lacks:
        kernels += f" only: torch is a CUDA build, but {lacks}"

    class Build(BuildExtension):
        def run(self) -> None:
            super().run()
            print(f"lora_kernels: built the {kernels}", flush=True)

    make = CUDAExtension if with_cuda else CppExtension
    flags = {"cxx": compiler_flags()} | ({"nvcc": ["-O3", "-std=c++20"]} if with_cuda else {})
    extension = make(
        "lora_kernels._C",
        sources + (cuda_sources if with_cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
    )
    return [extension], {"build_ext": Build}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
