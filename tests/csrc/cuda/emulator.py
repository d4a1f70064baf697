"""csrc/cuda/*.cu compiled for the CPU with the CUDA stand-in in `emulation/`, on NumPy arrays.

Outputs and workspaces are poisoned and guarded: an entry that a kernel leaves unwritten is NaN, and
a write outside an array is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...support import ROOT

CSRC = ROOT / "csrc"
EMULATION = Path(__file__).parent / "emulation"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
ORDERS = {"forward": 0, "reversed": 1, "mixed": 2}
# What a block may use: sm_86 and sm_89, sm_80, sm_90 and later.
SHARED = {"sm_86": 101_376, "sm_80": 166_912, "sm_90": 232_448}
ERRORS = {1: "invalid value", 9: "invalid configuration", 700: "illegal address", 719: "deadlock"}
_GUARD, _GUARD_BYTE = 4096, 0xA5


class CudaError(RuntimeError):
    """A launcher returned an error."""


def build(sources: list[Path], library: Path) -> ctypes.CDLL:
    """Compiles `sources` into `library` and loads it; RuntimeError with the compiler's errors."""
    # The fortified longjmp would report the switching of stacks as an error.
    command = [COMPILER, "-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-shared"]
    command += ["-I", str(EMULATION), "-I", str(CSRC), "-x", "c++", *map(str, sources)]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return ctypes.CDLL(str(library))


def check(error: int) -> None:
    if error:
        raise CudaError(ERRORS.get(error, str(error)))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


class Guarded:
    """An array of bytes 0xFF (NaN in every float type) between two guards."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype | type) -> None:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._memory = np.full(size + 2 * _GUARD, _GUARD_BYTE, np.uint8)
        self._memory[_GUARD : _GUARD + size] = 0xFF
        self.array = self._memory[_GUARD : _GUARD + size].view(dtype).reshape(shape)

    def taken(self) -> np.ndarray:
        guards = np.concatenate([self._memory[:_GUARD], self._memory[-_GUARD:]])
        assert (guards == _GUARD_BYTE).all(), "written outside its memory"
        return self.array


class Emulator:
    """The launchers of csrc/cuda/kernels.h."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.eigh_workspace.restype = ctypes.c_uint64

    @contextlib.contextmanager
    def machine(self, order: str = "forward", shared: int = SHARED["sm_90"]) -> Iterator[None]:
        """The order in which threads and blocks run, and how much shared memory a block may use."""
        self._library.set_order(ORDERS[order])
        self._library.set_shared_limit(ctypes.c_uint64(shared))
        try:
            yield
        finally:
            self._library.set_order(ORDERS["forward"])
            self._library.set_shared_limit(ctypes.c_uint64(SHARED["sm_90"]))

    def gaussian(self, rows: int, cols: int, seed: int, ld: int, dtype: type) -> np.ndarray:
        """[rows, ld] float32, or the bits of bfloat16 as uint16; columns from `cols` on are not
        written.
        """
        function = {np.float32: "sketch_float", np.uint16: "sketch_bfloat16"}[dtype]
        out = Guarded((rows, ld), dtype)
        sizes = map(ctypes.c_int64, (rows, cols, ld))
        launch = getattr(self._library, function)
        check(launch(pointer(out.array), *sizes, ctypes.c_uint64(seed)))
        return out.taken()

    def cholesky_inverse(self, gram: np.ndarray, tolerance: float) -> np.ndarray:
        """gram [batch, b, b] -> [batch, b, b]."""
        gram = np.ascontiguousarray(gram, np.float64)
        batch, size, _ = gram.shape
        out = Guarded(gram.shape, np.float64)
        launch = self._library.cholesky_inverse
        dims = ctypes.c_int64(batch), ctypes.c_int(size)
        check(launch(pointer(gram), pointer(out.array), *dims, ctypes.c_double(tolerance)))
        return out.taken()

    def eigh(self, matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """matrices [batch, l, l] -> values [batch, l], vectors [batch, l, l]."""
        matrices = np.ascontiguousarray(matrices, np.float64)
        batch, size, _ = matrices.shape
        dims = ctypes.c_int64(batch), ctypes.c_int(size)
        values, vectors = Guarded((batch, size), np.float64), Guarded(matrices.shape, np.float64)
        workspace = Guarded((self._library.eigh_workspace(*dims),), np.uint8)
        outputs = [pointer(guarded.array) for guarded in (values, vectors, workspace)]
        check(self._library.eigh(pointer(matrices), *outputs, *dims))
        workspace.taken()
        return values.taken(), vectors.taken()
