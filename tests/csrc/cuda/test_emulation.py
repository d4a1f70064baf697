"""The emulation passes correct kernels, in any order of their threads, and finds errors in wrong
ones.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from .emulator import CudaError, build, check, pointer

KERNELS = """
#include <cuda_runtime.h>

__global__ void neighbor(double* out, bool barrier) {
  LORA_DYNAMIC_SHARED(double, shared);
  const int t = threadIdx.x;
  shared[t] = 100.0 * blockIdx.x + t;
  if (barrier) __syncthreads();
  out[blockIdx.x * blockDim.x + t] = shared[(t + 1) % blockDim.x];
}

__global__ void beyond(double* out, int at) {
  LORA_DYNAMIC_SHARED(double, shared);
  shared[at] = 1.0;
  out[threadIdx.x] = shared[0];
}

__global__ void some_wait(double* out, int those) {
  if (static_cast<int>(threadIdx.x) < those) __syncthreads();
  out[threadIdx.x] = 1.0;
}

__global__ void reduce(double* out) {
  double sum = threadIdx.x;
  for (int distance = 1; distance < 32; distance *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  const int odd = __syncthreads_or(threadIdx.x == 40);
  const int none = __syncthreads_or(0);
  out[threadIdx.x] = sum + 1000.0 * odd + 100000.0 * none;
}

extern "C" {
void set_order(int order) {
  emulation::settings.order = static_cast<emulation::Order>(order);
}
int run_neighbor(double* out, int barrier) {
  LORA_LAUNCH(neighbor, dim3(2), 64, 64 * 8, nullptr, out, barrier != 0);
  return cudaGetLastError();
}
int run_beyond(double* out, int at) {
  LORA_LAUNCH(beyond, dim3(1), 32, 8 * 8, nullptr, out, at);
  return cudaGetLastError();
}
int run_some_wait(double* out, int those) {
  LORA_LAUNCH(some_wait, dim3(1), 64, 0, nullptr, out, those);
  return cudaGetLastError();
}
int run_reduce(double* out, int) {
  LORA_LAUNCH(reduce, dim3(1), 64, 0, nullptr, out);
  return cudaGetLastError();
}
int run_large(double* out, int bytes) {
  LORA_LAUNCH(beyond, dim3(1), 32, bytes, nullptr, out, 0);
  return cudaGetLastError();
}
int run_threads(double* out, int threads) {
  LORA_LAUNCH(some_wait, dim3(1), threads, 0, nullptr, out, 0);
  return cudaGetLastError();
}
int allow(int bytes) {
  return cudaFuncSetAttribute(
      reinterpret_cast<const void*>(beyond), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
}
"""


@pytest.fixture(scope="module")
def kernels(compiler, tmp_path_factory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("probes")
    (folder / "probes.cu").write_text(KERNELS)
    return build([folder / "probes.cu"], folder / "probes.so")


def run(kernels: ctypes.CDLL, name: str, argument: int, order: int = 0) -> np.ndarray:
    out = np.full(128, -1.0)
    kernels.set_order(order)
    check(getattr(kernels, f"run_{name}")(pointer(out), ctypes.c_int(argument)))
    return out


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_right_kernel(kernels, order):
    t = np.arange(64)
    want = np.concatenate([(t + 1) % 64, 100 + (t + 1) % 64])
    assert (run(kernels, "neighbor", 1, order) == want).all()


def test_a_race_depends_on_the_order(kernels):
    """It reads NaN where nothing was written yet."""
    forward, reverse = (run(kernels, "neighbor", 0, order) for order in (0, 1))
    assert np.isnan(forward).any()
    assert not np.array_equal(forward, reverse, equal_nan=True)


def test_shuffles_and_votes(kernels):
    for order in (0, 1, 2):
        out = run(kernels, "reduce", 0, order)
        assert (out[:32] == 1000 + sum(range(32))).all()
        assert (out[32:64] == 1000 + sum(range(32, 64))).all()


def test_shared_memory_starts_as_nan_and_ends_where_it_was_asked_to(kernels):
    assert np.isnan(run(kernels, "beyond", 7)[0])
    with pytest.raises(CudaError, match="illegal address"):
        run(kernels, "beyond", 8)


def test_a_barrier_that_some_threads_miss(kernels):
    assert (run(kernels, "some_wait", 64)[:64] == 1).all()
    with pytest.raises(CudaError, match="deadlock"):
        run(kernels, "some_wait", 40)
    assert (run(kernels, "some_wait", 64)[:64] == 1).all()  # the next launch is in order


def test_shared_memory_above_48_kb_is_asked_for(kernels):
    run(kernels, "large", 48 * 1024)
    with pytest.raises(CudaError, match="invalid configuration"):
        run(kernels, "large", 48 * 1024 + 8)
    check(kernels.allow(100 * 1024))
    run(kernels, "large", 100 * 1024)
    with pytest.raises(CudaError, match="invalid value"):
        check(kernels.allow(228 * 1024))


@pytest.mark.parametrize("threads", [0, 1025])
def test_a_block_that_no_gpu_takes(kernels, threads):
    with pytest.raises(CudaError, match="invalid configuration"):
        run(kernels, "threads", threads)


def test_errors_of_the_compiler_are_shown(compiler, tmp_path):
    (tmp_path / "wrong.cu").write_text("int f() { return undeclared; }")
    with pytest.raises(RuntimeError, match="undeclared"):
        build([tmp_path / "wrong.cu"], tmp_path / "wrong.so")
