"""Builds lora_kernels and its extension `lora_kernels._C`.

LORA_KERNELS_BUILD = auto (default) | cpu | cuda | none chooses what is compiled:
auto takes CUDA sources in when there are any, nvcc is found and torch is a CUDA build.
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


def lacking_cuda() -> str:
    """Why no CUDA kernels can be built."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    return "nvcc was not found (put it on the PATH, or set CUDA_HOME)"


def saying_what_it_built(build_ext: type, choice: str, cuda_home: str | None) -> type:
    """`build_ext` with one line at its end; `cuda_home` is None if it builds no CUDA kernels."""
    import torch

    kernels = f"CPU and CUDA kernels (CUDA_HOME={cuda_home})" if cuda_home else "CPU kernels"
    if torch.version.cuda is not None and choice == "auto" and not cuda_home:
        kernels += f" only: torch is a CUDA build, but {lacking_cuda()}"

    class Build(build_ext):
        def run(self) -> None:
            super().run()
            print(f"lora_kernels: built the {kernels}", flush=True)

    return Build


def compiler_flags() -> list[str]:
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-Wno-psabi", "-Wno-unknown-pragmas"]
    # at::parallel_for is serial in a file compiled without OpenMP. Apple's clang has no -fopenmp.
    return flags + (["-Xpreprocessor", "-fopenmp"] if sys.platform == "darwin" else ["-fopenmp"])


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
    has_cuda = torch.version.cuda is not None and CUDA_HOME is not None
    if choice == "cuda" and not has_cuda:
        raise SystemExit(f"LORA_KERNELS_BUILD=cuda: {lacking_cuda()}")
    with_cuda = bool(cuda_sources) and has_cuda and choice != "cpu"
    make = CUDAExtension if with_cuda else CppExtension
    flags = {"cxx": compiler_flags()} | ({"nvcc": ["-O3", "-std=c++20"]} if with_cuda else {})
    extension = make(
        "lora_kernels._C",
        sources + (cuda_sources if with_cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
    )
    build_ext = saying_what_it_built(BuildExtension, choice, CUDA_HOME if with_cuda else None)
    return [extension], {"build_ext": build_ext}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
