// y = x W^T + b + s drop(x) A^T R^T B^T - s x A0^T B0^T (R is optional), and its gradients. The
// products are torch's where it has fast ones (product.h): at ranks up to 128 its thin products run
// at 150-800 GF/s, so that a forward at rank 16 takes 1-2 % longer than the product with W alone.
// The only fusion is the addition to y and dx in place (beta = 1).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "product.h"
#include "simd/kernels.h"

namespace lora {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Dropout {
  double p;
  const OptionalTensor& seed;
  int64_t col_offset;  // position of x's first column in the rows that the mask is for

  bool active() const { return p > 0.0; }

  // x [M, K] with the mask of (row, column, seed) applied, the same at every call.
  at::Tensor operator()(const at::Tensor& x) const {
    const auto source = x.contiguous();
    auto out = at::empty_like(source);
    const Philox philox{
        static_cast<uint64_t>(seed->item<int64_t>()),
        static_cast<uint32_t>(std::min(std::floor(p * 4294967296.0), 4294967295.0)),
        static_cast<float>(p < 1.0 ? 1.0 / (1.0 - p) : 0.0), col_offset};
    const auto dtype = source.scalar_type();
    const int64_t columns = source.size(1);
    const auto bytes = columns * static_cast<int64_t>(source.element_size());
    const auto* in = static_cast<const char*>(source.data_ptr());
    auto* result = static_cast<char*>(out.data_ptr());
    const auto& kernel = kernels();
    at::parallel_for(0, source.size(0), 8, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        kernel.dropout_row(in + row * bytes, result + row * bytes, dtype, row, columns, philox);
      }
    });
    return out;
  }
};

at::Tensor as_rows(const at::Tensor& x) {
  if (x.dim() == 2) {
    return x;
  }
  int64_t count = 1;
  for (const auto size : x.sizes().slice(0, x.dim() - 1)) {
    count *= size;
  }
  return x.reshape({count, x.size(-1)});
}

// z R^T, which is then multiplied by B^T.
at::Tensor through_R(const at::Tensor& z, const OptionalTensor& lora_R) {
  return lora_R ? product(z, lora_R->to(z.scalar_type()).t()) : z;
}

std::tuple<at::Tensor, at::Tensor> linear_forward(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
    const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling, double dropout,
    const OptionalTensor& seed, const OptionalTensor& start_A, const OptionalTensor& start_B,
    const OptionalTensor& lora_R, int64_t col_offset) {
  const auto dtype = x.scalar_type();
  const Dropout drop{dropout, seed, col_offset};
  const auto rows = as_rows(x);                                      // [M, K]
  const auto A = lora_A.to(dtype), B = lora_B.to(dtype);             // [r, K], [N, r]
  const auto z = product(drop.active() ? drop(rows) : rows, A.t());  // [M, r]
  const auto into_B = through_R(z, lora_R);                          // [M, r]
  auto y = base_product(rows, weight, bias);                         // [M, N]
  if (start_A) {
    // One product of rank 2r, so that A, B and A0, B0 cancel before y is rounded.
    const auto z0 = product(rows, start_A->to(dtype).t());
    add_product_(
        y, at::cat({into_B, z0}, 1), at::cat({B, start_B->to(dtype).neg()}, 1).t(), scaling);
  } else {
    add_product_(y, into_B, B.t(), scaling);
  }
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0);
  return {at::_unsafe_view(y, shape), z};  // not a view, so that a user may write to y in place
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& lora_A,
    const at::Tensor& lora_B, const at::Tensor& z, double scaling, double dropout,
    const OptionalTensor& seed, const OptionalTensor& start_A, const OptionalTensor& start_B,
    const OptionalTensor& lora_R, std::array<bool, 6> needs, int64_t col_offset) {
  const auto [needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_R] = needs;
  const auto dtype = x.scalar_type();
  const Dropout drop{dropout, seed, col_offset};
  const auto dy = as_rows(grad), rows = as_rows(x);
  const auto A = lora_A.to(dtype);
  const auto none = [&] { return at::empty({0}, x.options()); };

  at::Tensor dz;  // [M, r]
  auto dR = none();
  if (needs_x || needs_A || needs_R) {
    dz = product(dy, lora_B.to(dtype)).mul_(scaling);
    if (needs_R) {
      dR = product(dz.t(), z).to(lora_R->scalar_type());
    }
    if (lora_R) {
      dz = product(dz, lora_R->to(dtype));
    }
  }
  auto dx = none();
  if (needs_x) {
    dx = product(dy, weight);
    if (drop.active()) {
      dx.add_(drop(product(dz, A)));
      if (start_A) {
        add_product_(dx, product(dy, start_B->to(dtype)), start_A->to(dtype), -scaling);
      }
    } else if (start_A) {
      const auto dz0 = product(dy, start_B->to(dtype)).mul_(-scaling);
      add_product_(dx, at::cat({dz, dz0}, 1), at::cat({A, start_A->to(dtype)}, 0), 1.0);
    } else {
      add_product_(dx, dz, A, 1.0);
    }
    dx = dx.reshape(x.sizes());
  }
  auto dA = needs_A ? product(dz.t(), drop.active() ? drop(rows) : rows).to(lora_A.scalar_type())
                    : none();
  auto dB = needs_B ? product(dy.t(), through_R(z, lora_R)).to(lora_B.scalar_type()).mul_(scaling)
                    : none();
  auto dweight = needs_weight ? product(dy.t(), rows) : none();
  auto dbias = needs_bias ? dy.sum(0) : none();
  return {dx, dweight, dbias, dA, dB, dR};
}

// linear_forward without dropout, with ATen's operations only, on any device.
std::tuple<at::Tensor, at::Tensor> linear_plain(
    const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
    const at::Tensor& lora_A, const at::Tensor& lora_B, double scaling,
    const OptionalTensor& start_A, const OptionalTensor& start_B, const OptionalTensor& lora_R) {
  return linear_forward(
      x, weight, bias, lora_A, lora_B, scaling, 0.0, std::nullopt, start_A, start_B, lora_R, 0);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  m.impl("linear_forward", linear_forward);
  m.impl("linear_backward", linear_backward);
  m.impl("_linear_plain", linear_plain);
}

TORCH_LIBRARY_IMPL(lora, CUDA, m) {
  m.impl("_linear_plain", linear_plain);
}

}  // namespace lora
