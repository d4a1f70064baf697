"""Build lora_kernels and its extension `lora_kernels._C`.

LORA_KERNELS_BUILD = auto (default) | cpu | cuda | none selects what is compiled: auto includes the
CUDA kernels if nvcc is found and torch is a CUDA build. Binaries are portable: the instruction set
is chosen at run time (csrc/cpu/simd/dispatch.cpp), one binary fits every Python from 3.10 on
(csrc/module.cpp), and glibc from 2.28 on (csrc/glibc_2_28.h). It fits one minor version of torch,
which the file's name contains (lora_kernels/ops/_backends/extension.py).

All C++ files of a folder are compiled as one, because half of a file's compile time was spent on
torch's headers. A further quarter was spent on debug information, which is turned off.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "cuda", "none")
# Builds of Python without a global lock have no stable interface.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


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


def choose_cuda_archs() -> None:
    """Without a GPU, as in the build of a container, compiles for the GPUs of data centers. torch
    compiles for the GPUs that it sees, and fails with an IndexError if it sees none.
    """
    import torch

    if not torch.cuda.is_available():
        cuda = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
        archs = "8.0;9.0;10.0+PTX" if cuda >= (12, 8) else "8.0;9.0+PTX"  # what its nvcc knows
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", archs)


def lacking_cuda() -> str:
    """The reason why no CUDA kernels can be built."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return "nvcc was not found (put it on the PATH, or set CUDA_HOME)"


class Wheel(bdist_wheel):
    """A wheel with an extension, for Python 3.10 and later."""

    def finalize_options(self) -> None:
        if LIMITED_API:
            self.py_limited_api = "cp310"
        super().finalize_options()


def build_command(build_ext: type, choice: str, cuda_home: str | None) -> type:
    """`build_ext` that puts torch's version into the file's name and prints what it built.
    `cuda_home` is None if it builds no CUDA kernels.
    """
    import torch

    versions = runpy.run_path(str(ROOT / "lora_kernels" / "_utils" / "version.py"))
    fits = versions["torch_abi"](torch.__version__)
    kernels = f"CPU and CUDA kernels (CUDA_HOME={cuda_home})" if cuda_home else "CPU kernels"
    if torch.version.cuda is not None and choice == "auto" and not cuda_home:
        kernels += f" only: torch is a CUDA build, but {lacking_cuda()}"

    class Build(build_ext):
        def get_ext_filename(self, ext_name: str) -> str:
            name, _, suffix = super().get_ext_filename(ext_name).partition(".")
            return f"{name}.torch{fits}.{suffix}"

        def run(self) -> None:
            super().run()
            print(f"lora_kernels: built the {kernels}", flush=True)

    return Build


def compiler_flags() -> list[str]:
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags += ["-include", "glibc_2_28.h"]
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
    if with_cuda:
        choose_cuda_archs()
    # torch uses ccache where it is installed; with this, other clones find the same objects.
    os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
    make = CUDAExtension if with_cuda else CppExtension
    flags = {"cxx": compiler_flags()} | ({"nvcc": ["-O3", "-std=c++20"]} if with_cuda else {})
    extension = make(
        "lora_kernels._C",
        sources + (cuda_sources if with_cuda else []),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=[("LORA_CUDA_KERNELS", "1")] if with_cuda else [],
        extra_compile_args=flags,
        py_limited_api=LIMITED_API,
    )
    build_ext = build_command(BuildExtension, choice, CUDA_HOME if with_cuda else None)
    return [extension], {"build_ext": build_ext, "bdist_wheel": Wheel}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
