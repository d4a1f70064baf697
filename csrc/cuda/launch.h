// Used by every .cu file here to launch its kernels. tests/csrc/cuda/emulation/ has other
// definitions of the two macros, with which the same files run on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#ifndef LORA_LAUNCH
#define LORA_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define LORA_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace lora {
namespace cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

// The largest amount of shared memory for a block on the current device.
inline cudaError_t shared_memory_limit(size_t& bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  bytes = static_cast<size_t>(limit);
  return error;
}

// More than 48 KB has to be requested explicitly.
template <typename... Arguments>
cudaError_t allow_shared_memory(void (*kernel)(Arguments...), size_t bytes) {
  return cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(bytes));
}

}  // namespace cuda
}  // namespace lora
