"""Every CUDA source compiles for its target GPUs and keeps its values in registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from ..support import ROOT
from ..support.exhaustive import EXHAUSTIVE

CSRC = ROOT / "csrc"
ARCHITECTURES = ["80", "90a", "100"] if EXHAUSTIVE else ["90a"]
NVCC = shutil.which(
    "nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
)
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def compile_cuda(source: Path, arch: str, out_dir: Path) -> str:
    """ptxas's report on the kernels of `source`; AssertionError with the compiler's errors."""
    command = [NVCC, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-std=c++20", "-O3"]
    command += ["-I", str(CSRC), "-Xptxas", "-v", "-c", str(source), "-o", str(out_dir / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr


def spilled_bytes(report: str) -> list[int]:
    """For each function of the report, the bytes that it spills to its stack and loads back."""
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return [int(stores) + int(loads) for stores, loads in spills]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "source", sorted(CSRC.rglob("*.cu")), ids=lambda path: str(path.relative_to(CSRC))
)
def test_compiles_without_spills(source, arch, tmp_path):
    report = compile_cuda(source, arch, tmp_path)
    assert not any(spilled_bytes(report)), report


@pytest.mark.parametrize(
    "source", sorted(CSRC.glob("cuda/*.cpp")), ids=lambda path: str(path.relative_to(CSRC))
)
def test_binding_compiles(source, tmp_path):
    """Against CUDA's and torch's headers; a CPU build lacks one header, which is generated."""
    stand_in = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    # After torch's own folders, since a CUDA build has the real header.
    folders = [str(CSRC), *include_paths(), str(tmp_path)]
    command = [NVCC, "-std=c++20", "-Xcompiler=-Wall,-Werror=return-type"]
    command += [flag for folder in folders for flag in ("-I", folder)]
    command += ["-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_the_binding_knows_torch():
    """Kernels that do not include torch compile wherever nvcc is installed."""
    for source in [*CSRC.rglob("*.cu"), *CSRC.glob("cuda/*.h")]:
        included = re.findall(r"#include <(.+)>", source.read_text())
        assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))]


CLEAN = """
#include <cuda_runtime.h>

__global__ void scale(float* out, const float* in, float factor, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = factor * in[i];
}

void launch_scale(float* out, const float* in, float factor, int count, cudaStream_t stream) {
  scale<<<(count + 255) / 256, 256, 0, stream>>>(out, in, factor, count);
}
"""

# 96 live values in 32 registers a thread, all that two blocks of 1024 threads leave.
SPILLS = """
__global__ void __launch_bounds__(1024, 2) reverse(float* out, const float* in) {
  float values[96];
#pragma unroll
  for (int k = 0; k < 96; ++k) values[k] = in[1024 * k + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 96; ++k) out[1024 * k + threadIdx.x] = values[95 - k] * values[k];
}
"""


class TestTheGate:
    """The check passes correct code and fails spilling code."""

    def compile(self, code: str, arch: str, folder: Path) -> str:
        source = folder / "kernel.cu"
        source.write_text(code)
        return compile_cuda(source, arch, folder)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_a_clean_kernel(self, arch, tmp_path):
        report = self.compile(CLEAN, arch, tmp_path)
        assert f"sm_{arch}" in report
        assert spilled_bytes(report) == [0]
        assert (tmp_path / "out.o").stat().st_size > 0

    def test_a_syntax_error(self, tmp_path):
        with pytest.raises(AssertionError, match=r'expected a ";"'):
            self.compile(CLEAN.replace("in[i];", "in[i]"), "90a", tmp_path)

    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_a_kernel_that_spills(self, arch, tmp_path):
        (spilled,) = spilled_bytes(self.compile(SPILLS, arch, tmp_path))
        assert spilled > 0
