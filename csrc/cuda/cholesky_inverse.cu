#include <algorithm>

#include "kernels.h"
#include "launch.h"

// One block of threads per matrix. The lower triangle S begins as that of G and ends as L^-1, where
// G = L L^T, by one elimination of [G | I] in place: column k of G is no longer needed when column
// k of L^-1 begins. A step scales row and column k and applies one rank-1 update to all rows below,
// with two barriers.
//
// Lower bound on the time for 128 columns: b^3 / 3 updates of 24 bytes of shared memory at 128
// bytes per clock are 131,000 clocks, 70 us at 1.9 GHz, and 128 steps have about 300 clocks of
// latency each, 20 us; for 64 columns 9 us and 10 us. All matrices of a batch of up to 132 run at
// the same time. The packed triangle takes 66 KB at 128 columns, and the only other shared memory
// is one row: 99 KB are enough for up to 156 columns.

namespace lora {
namespace cuda {
namespace {

constexpr int kMaxThreads = 512;

size_t packed_bytes(int size) {
  return sizeof(double) * (static_cast<size_t>(size) * (size + 1) / 2);
}

// kPacked: S is in shared memory; otherwise it is in the lower triangle of the result.
template <bool kPacked>
__global__ void __launch_bounds__(kMaxThreads, 1)
    invert_factor(const double* __restrict__ gram, double* inverse, int size, double tolerance) {
  LORA_DYNAMIC_SHARED(double, shared);
  double* const step = shared;  // [size]: row k of L^-1 up to k, column k of L below
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * size * size;
  gram += offset;
  inverse += offset;
  const auto row = [&](int i) {
    return kPacked ? shared + size + static_cast<int64_t>(i) * (i + 1) / 2
                   : inverse + static_cast<int64_t>(i) * size;
  };
  const int thread = threadIdx.x, threads = blockDim.x;
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;

  for (int i = warp; i < size; i += warps) {
    for (int j = lane; j <= i; j += kWarp) {
      row(i)[j] = gram[static_cast<int64_t>(i) * size + j];
    }
  }
  __syncthreads();

  for (int k = 0; k < size; ++k) {
    const double pivot = row(k)[k];
    const double scale = 1.0 / sqrt(pivot);
    bool unfit = !(pivot > tolerance);
    for (int j = thread; j < size; j += threads) {
      const double value = j == k ? scale : (j < k ? row(k)[j] : row(j)[k]) * scale;
      step[j] = value;
      // Below k, an Inf or NaN affects only row j, column j and their pivot.
      unfit |= j <= k && !isfinite(value);
    }
    const bool dropped = __syncthreads_or(unfit);
    for (int i = k + warp; i < size; i += warps) {
      double* const s = row(i);
      if (dropped) {
        for (int j = i == k ? lane : k + lane; j <= k; j += kWarp) {
          s[j] = 0.0;
        }
      } else if (i == k) {
        for (int j = lane; j <= k; j += kWarp) {
          s[j] = step[j];
        }
      } else {
        const double factor = step[i];
        for (int j = lane; j <= i; j += kWarp) {
          s[j] = (j == k ? 0.0 : s[j]) - factor * step[j];
        }
      }
    }
    __syncthreads();
  }

  for (int i = warp; i < size; i += warps) {  // S^T, above the diagonal
    for (int j = i + lane; j < size; j += kWarp) {
      inverse[static_cast<int64_t>(i) * size + j] = row(j)[i];
    }
  }
  __syncthreads();
  for (int i = warp; i < size; i += warps) {
    for (int j = lane; j < i; j += kWarp) {
      inverse[static_cast<int64_t>(i) * size + j] = 0.0;
    }
  }
}

}  // namespace

cudaError_t launch_cholesky_inverse(
    const double* gram, double* inverse, int64_t batch, int size, double tolerance,
    cudaStream_t stream) {
  if (batch == 0 || size == 0) {
    return cudaSuccess;
  }
  size_t limit = 0;
  cudaError_t error = shared_memory_limit(limit);
  if (error != cudaSuccess) {
    return error;
  }
  const size_t step_bytes = sizeof(double) * size;
  const bool packed = step_bytes + packed_bytes(size) <= limit;
  const size_t bytes = step_bytes + (packed ? packed_bytes(size) : 0);
  const auto kernel = packed ? invert_factor<true> : invert_factor<false>;
  error = allow_shared_memory(kernel, bytes);
  if (error != cudaSuccess) {
    return error;
  }
  // Each warp takes a row: no more warps than rows, and several rows per warp if there are many.
  const int threads = std::min(kMaxThreads, kWarp * std::max(1, (size + 3) / 4));
  LORA_LAUNCH(
      kernel, static_cast<unsigned>(batch), threads, bytes, stream, gram, inverse, size, tolerance);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace lora
