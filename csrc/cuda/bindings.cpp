// Adds the kernels of this folder to the table that the SVD driver reads. No other file here uses
// torch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "kernels.h"
#include "svd/device_kernels.h"

namespace lora {
namespace {

void gaussian(const at::Tensor& out, uint64_t seed) {
  TORCH_CHECK(out.dim() == 2, "gaussian: expected out of shape [rows, cols], got ", out.sizes());
  TORCH_CHECK(
      out.size(1) <= 1 || (out.stride(1) == 1 && out.stride(0) >= out.size(1)),
      "gaussian: expected rows of out that do not overlap and have unit stride, got strides ",
      out.strides());
  const c10::cuda::CUDAGuard guard(out.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t rows = out.size(0), cols = out.size(1), ld = out.stride(0);
  if (out.scalar_type() == at::kFloat) {
    C10_CUDA_CHECK(
        cuda::launch_gaussian_sketch(out.mutable_data_ptr<float>(), rows, cols, ld, seed, stream));
  } else {
    TORCH_CHECK(
        out.scalar_type() == at::kBFloat16, "gaussian: expected float32 or bfloat16, got ",
        out.scalar_type());
    auto* const bits = reinterpret_cast<uint16_t*>(out.mutable_data_ptr<at::BFloat16>());
    C10_CUDA_CHECK(cuda::launch_gaussian_sketch(bits, rows, cols, ld, seed, stream));
  }
}

// `matrices` as the kernels expect them: [batch, size, size], contiguous.
at::Tensor square_batch(const at::Tensor& matrices, const char* name) {
  TORCH_CHECK(
      matrices.dim() == 3 && matrices.size(1) == matrices.size(2) &&
          matrices.size(2) <= std::numeric_limits<int>::max(),
      name, ": expected matrices of shape [batch, size, size], got ", matrices.sizes());
  TORCH_CHECK(
      matrices.scalar_type() == at::kDouble, name, ": expected float64, got ",
      matrices.scalar_type());
  return matrices.contiguous();
}

at::Tensor cholesky_inverse(const at::Tensor& gram, double tolerance) {
  const c10::cuda::CUDAGuard guard(gram.device());
  const auto from = square_batch(gram, "cholesky_inverse");
  auto inverse = at::empty(from.sizes(), from.options());
  C10_CUDA_CHECK(
      cuda::launch_cholesky_inverse(
          from.const_data_ptr<double>(), inverse.mutable_data_ptr<double>(), from.size(0),
          static_cast<int>(from.size(1)), tolerance, c10::cuda::getCurrentCUDAStream()));
  return inverse;
}

std::tuple<at::Tensor, at::Tensor> eigh(const at::Tensor& matrices) {
  const c10::cuda::CUDAGuard guard(matrices.device());
  const auto from = square_batch(matrices, "eigh");
  const int64_t batch = from.size(0);
  const auto size = static_cast<int>(from.size(1));
  auto values = at::empty({batch, size}, from.options());
  auto vectors = at::empty(from.sizes(), from.options());
  const auto bytes = static_cast<int64_t>(cuda::jacobi_eigh_workspace(batch, size));
  const auto workspace = at::empty({bytes}, from.options().dtype(at::kByte));
  const cudaError_t error = cuda::launch_jacobi_eigh(
      from.const_data_ptr<double>(), values.mutable_data_ptr<double>(),
      vectors.mutable_data_ptr<double>(), workspace.mutable_data_ptr(), batch, size,
      c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(
      error != cudaErrorInvalidValue, "eigh: matrices of size ", size,
      " are too large for the shared memory of ", from.device());
  C10_CUDA_CHECK(error);
  return {values, vectors};
}

[[maybe_unused]] const bool filled = [] {
  cuda_kernels() = {gaussian, cholesky_inverse, eigh};
  return true;
}();

}  // namespace
}  // namespace lora
