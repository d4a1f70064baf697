// What every .cu file here launches its kernels with. tests/cuda/emulation/ has the other
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

// The most shared memory that a block may ask for on the current device.
inline cudaError_t shared_memory_limit(size_t& bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  bytes = static_cast<size_t>(limit);
  return error;
}

// More than 48 KB has to be asked for.
template <typename... Arguments>
cudaError_t allow_shared_memory(void (*kernel)(Arguments...), size_t bytes) {
  return cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(bytes));
}

}  // namespace cuda
}  // namespace lora
