"""Build lora_kernels and its extension `lora_kernels._C`.

LORA_KERNELS_BUILD = auto (default) | cpu | cuda | none selects what is compiled: auto includes the
CUDA kernels if nvcc is found and torch is a CUDA build. Binaries are portable: the instruction set
is chosen at run time (csrc/cpu/simd/dispatch.cpp).

All C++ files of a folder are compiled as one, because half of a file's compile time was spent on
torch's headers. A further quarter was spent on debug information, which is turned off.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "none")


def find_cuda_home() -> None:
    """Set CUDA_HOME to the folder that nvcc itself reports. torch uses the parent of nvcc's folder,
    which is wrong where the nvcc on the PATH is a script that calls another one.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    command = [nvcc, "-dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if top := re.search(r"^#\$ TOP=(.+)$", said.stdout + said.stderr, re.MULTILINE):
        os.environ["CUDA_HOME"] = str(Path(top[1].strip()).resolve())


def lacking_cuda() -> str:
    """The reason why no CUDA kernels can be built."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return "nvcc was not found (put it on the PATH, or set CUDA_HOME)"


def saying_what_it_built(build_ext: type, choice: str, cuda_home: str | None) -> type:
    """`build_ext` that prints what it built; `cuda_home` is None if it builds no CUDA kernels."""
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
    if "-g" not in os.environ.get("CFLAGS", "").split():
        flags.append("-g0")  # Python's own flags contain -g
    return flags + openmp_flags()


def openmp_flags() -> list[str]:
    """Flags with which at::parallel_for uses torch's threads; without them it is serial."""
    if sys.platform == "darwin":
        return ["-Xpreprocessor", "-fopenmp"]  # Apple's clang has no -fopenmp
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        return ["-fopenmp"]  # the build will report that the compiler is missing
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    if "clang" in told.stdout:
        # Code from clang calls libomp, and torch's wheels contain libgomp. With both, one would
        # start the threads and the other number them, so that all threads would do the same work.
        print("lora_kernels: built with clang, the CPU kernels use one thread (with g++: all)")
        return []
    return ["-fopenmp"]


def unity_sources(sources: set[Path], folder: Path) -> list[str]:
    """Write one file per folder of `sources`, which includes all of them, into `folder`.

    Files that raise the instruction set, recognized by the word LORA_ISA, are compiled alone.
    """
    alone = {p for p in sources if "LORA_ISA" in p.read_text()}
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for part in sorted({p.parent for p in sources - alone}):
        parts = sorted(p for p in sources - alone if p.parent == part)
        text = "".join(f'#include "{p.relative_to(ROOT / "csrc").as_posix()}"\n' for p in parts)
        path = folder / f"{part.name}.cpp"
        if not path.exists() or path.read_text() != text:  # else it would be compiled again
            path.write_text(text)
        made.append(path)
    return sorted(p.relative_to(ROOT).as_posix() for p in alone | set(made))


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
    sources = unity_sources(everything - of_cuda, ROOT / "build" / "unity")
    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in of_cuda)
    has_cuda = torch.version.cuda is not None and CUDA_HOME is not None
    if choice == "cuda" and not has_cuda:
        raise SystemExit(f"LORA_KERNELS_BUILD=cuda: {lacking_cuda()}")
    with_cuda = bool(cuda_sources) and has_cuda and choice != "cpu"
    # torch uses ccache where it is installed; with this, other clones find the same objects.
    os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
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
