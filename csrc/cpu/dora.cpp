// The passes over y and dy of a DoRA layer: y = y0 * gain + bias, and its backward.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "simd/kernels.h"

namespace lora {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr int64_t kDoraRows = 8;
// The number of rows whose sums are added in the gain's precision, before these are added in
// float64.
constexpr int64_t kDoraGradRows = 32;

int64_t dora_rows(const at::Tensor& y, int64_t columns) {
  return columns == 0 ? 0 : y.numel() / columns;
}

at::Tensor dora_scale(const at::Tensor& y0, const at::Tensor& gain, const OptionalTensor& bias) {
  const auto in = y0.contiguous(), factors = gain.contiguous();
  const auto shift = bias ? bias->contiguous() : at::Tensor();
  auto out = at::empty_like(in);
  const int64_t columns = gain.size(0), bytes = columns * in.element_size();
  const auto* source = static_cast<const char*>(in.const_data_ptr());
  auto* result = static_cast<char*>(out.mutable_data_ptr());
  const auto& kernel = kernels();
  at::parallel_for(0, dora_rows(in, columns), kDoraRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kernel.dora_scale_row(
          {source + row * bytes, factors.const_data_ptr(), bias ? shift.const_data_ptr() : nullptr,
           result + row * bytes, in.scalar_type(), columns});
    }
  });
  return out;
}

// The sums over the blocks of rows, [blocks, columns], in a fixed order.
at::Tensor block_total(const at::Tensor& parts) {
  return parts.size(0) == 1 ? parts[0] : parts.sum(0, false, at::kDouble).to(parts.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> dora_scale_backward(
    const at::Tensor& grad, const OptionalTensor& y0, const at::Tensor& gain, bool needs_y0,
    bool needs_bias) {
  const auto dy = grad.contiguous(), factors = gain.contiguous();
  const auto before = y0 ? y0->contiguous() : at::Tensor();
  const int64_t columns = gain.size(0), rows = dora_rows(dy, columns);
  const int64_t blocks = std::max<int64_t>(1, (rows + kDoraGradRows - 1) / kDoraGradRows);
  auto dy0 = needs_y0 ? at::empty_like(dy) : at::empty({0}, grad.options());
  auto dgain = at::zeros({y0 ? blocks : 0, columns}, gain.options());
  auto dbias = at::zeros({needs_bias ? blocks : 0, columns}, gain.options());
  const int64_t bytes = columns * dy.element_size(), wide = columns * gain.element_size();
  const auto at_row = [](const at::Tensor& t, int64_t offset) {
    return t.defined() && t.numel() > 0 ? static_cast<char*>(t.data_ptr()) + offset : nullptr;
  };
  const auto& kernel = kernels();
  at::parallel_for(0, rows == 0 ? 0 : blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kDoraGradRows; row < std::min(rows, end * kDoraGradRows); ++row) {
      const int64_t sums = row / kDoraGradRows * wide;
      kernel.dora_scale_grad_row(
          {at_row(dy, row * bytes), at_row(before, row * bytes), factors.const_data_ptr(),
           at_row(dy0, row * bytes), at_row(dgain, sums), at_row(dbias, sums), dy.scalar_type(),
           columns});
    }
  });
  const auto none = at::empty({0}, gain.options());
  return {
      dy0, y0 ? block_total(dgain) : none,
      (needs_bias ? block_total(dbias) : none).to(grad.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  m.impl("_dora_scale", dora_scale);
  m.impl("_dora_scale_backward", dora_scale_backward);
}

}  // namespace lora
