from __future__ import annotations

import sys

import pytest

from .emulator import COMPILER, CSRC, EMULATION, Emulator, build


@pytest.fixture(scope="session")
def compiler() -> None:
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("running CUDA kernels on the CPU needs Linux and a C++ compiler")


@pytest.fixture(scope="session")
def emulator(compiler, tmp_path_factory) -> Emulator:
    sources = [*sorted(CSRC.glob("cuda/*.cu")), EMULATION / "entry.cpp"]
    return Emulator(build(sources, tmp_path_factory.mktemp("emulation") / "kernels.so"))
