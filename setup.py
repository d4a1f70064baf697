"""Builds lora_kernels and its extension `lora_kernels._C`.

LORA_KERNELS_BUILD = auto (default) | cpu | cuda | none chooses what is compiled:
auto takes CUDA sources in when there are any, nvcc is found and torch is a CUDA build.
Binaries are portable: the instruction set is chosen when the program runs (csrc/cpu/kernels.h).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")


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

    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    csrc = ROOT / "csrc"
    everything = {p for kind in ("*.cpp", "*.cu") for p in csrc.rglob(kind)}
    of_cuda = {p for p in everything if p.suffix == ".cu" or csrc / "cuda" in p.parents}
    sources = sorted(str(p.relative_to(ROOT)) for p in everything - of_cuda)
    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in of_cuda)
    has_cuda = torch.version.cuda is not None and CUDA_HOME is not None
    if choice == "cuda" and not has_cuda:
        raise SystemExit("LORA_KERNELS_BUILD=cuda needs nvcc and a CUDA build of torch")
    with_cuda = bool(cuda_sources) and has_cuda and choice != "cpu"
    make = CUDAExtension if with_cuda else CppExtension
    flags = {"cxx": compiler_flags()} | ({"nvcc": ["-O3", "-std=c++20"]} if with_cuda else {})
    extension = make(
        "lora_kernels._C",
        sources + (cuda_sources if with_cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
    )
    return [extension], {"build_ext": BuildExtension}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
