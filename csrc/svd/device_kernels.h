// Small steps of the SVD driver, limited by latency, for which a device may have its own kernels.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>
namespace lora {
struct DeviceKernels {
  // out [rows, cols] float32 or bfloat16, with a column stride of 1: standard normal numbers, as a
  // function of (seed, row, column).
  void (*gaussian)(const at::Tensor& out, uint64_t seed) = nullptr;
  // From gram [batch, b, b] float64, the upper-triangular inverse Cholesky factors; dropped columns
  // are zero.
  at::Tensor (*cholesky_inverse)(const at::Tensor& gram, double tolerance) = nullptr;
  // From symmetric matrices [batch, l, l] float64: values [batch, l], descending, and vectors
  // [batch, l, l] as columns.
  std::tuple<at::Tensor, at::Tensor> (*eigh)(const at::Tensor& matrices) = nullptr;
};
DeviceKernels& cuda_kernels();  // set when a CUDA build is loaded; otherwise empty
}  // namespace lora
