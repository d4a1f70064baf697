// The small, latency-bound parts of the SVD driver that a device may have kernels of its own for.
#pragma once
#include <ATen/core/Tensor.h>

#include <tuple>
namespace lora {
struct DeviceKernels {
  // out [rows, cols] float32 or bfloat16, unit column stride: standard normals, a function of
  // (seed, row, column).
  void (*gaussian)(const at::Tensor& out, uint64_t seed) = nullptr;
  // gram [batch, b, b] float64 -> the upper-triangular inverse Cholesky factors, dropped columns
  // zero.
  at::Tensor (*cholesky_inverse)(const at::Tensor& gram, double tolerance) = nullptr;
  // matrices [batch, l, l] float64 symmetric -> (values descending [batch, l], vectors [batch, l,
  // l] as columns).
  std::tuple<at::Tensor, at::Tensor> (*eigh)(const at::Tensor& matrices) = nullptr;
};
DeviceKernels& cuda_kernels();  // what the CUDA build fills in when it is loaded; empty otherwise
}  // namespace lora
