#include "grouped_product.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lora::grouped {
namespace {

// oneDNN makes a kernel for every shape, which takes 0.5 ms, and keeps 1024 of them. So the number
// of rows of an expert is rounded up.
constexpr int64_t kRowsTogether = 8;

// Entries of a converted tile: 512 KB, half of a core's L2 cache.
constexpr int64_t kTileEntries = 1 << 17;

void convert_row(const char* source, c10::ScalarType dtype, char* out, int64_t count, bool widen) {
  if (widen) {
    kernels().widen_row(source, dtype, reinterpret_cast<float*>(out), count);
  } else {
    std::memcpy(out, source, count * c10::elementSize(dtype));
  }
}

// out[i, :] = operand row begin + i, columns from `left` on, converted if the dtypes differ.
void gather(
    const Operand& from, int64_t begin, int64_t count, int64_t left, const at::Tensor& out) {
  const auto dtype = from.matrix.scalar_type();
  const int64_t size = c10::elementSize(dtype), row_bytes = from.matrix.size(1) * size;
  const int64_t columns = out.size(1), out_bytes = columns * out.element_size();
  const auto* source = static_cast<const char*>(from.matrix.const_data_ptr()) + left * size;
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = from.rows == nullptr ? begin + i : from.rows[begin + i];
    convert_row(
        source + row * row_bytes, dtype, target + i * out_bytes, columns,
        out.scalar_type() != dtype);
  }
}

// M in float32, in the order of its entries in memory.
at::Tensor converted(const at::Tensor& M, Scratch& scratch) {
  if (M.stride(1) != 1 && M.stride(0) == 1) {
    return converted(M.t(), scratch).t();
  }
  const auto out = scratch.matrix(kTile, M.size(0), M.size(1), at::kFloat);
  if (M.stride(1) != 1) {
    return out.copy_(M);
  }
  const auto* source = static_cast<const char*>(M.const_data_ptr());
  for (int64_t i = 0; i < M.size(0); ++i) {
    kernels().widen_row(
        source + i * M.stride(0) * M.element_size(), M.scalar_type(),
        out.mutable_data_ptr<float>() + i * M.size(1), M.size(1));
  }
  return out;
}

}  // namespace

Precision::Precision(c10::ScalarType dtype)
    : model(dtype),
      sums(dtype == at::kDouble ? at::kDouble : at::kFloat),
      narrow(model != sums && has_quick_products(dtype)) {}

at::Tensor Factors::one(const at::Tensor& stack, int64_t expert) const {
  return stack.select(0, expert).to(precision.model).to(precision.sums);
}

at::Tensor Factors::down(int64_t expert) const {
  const auto own = one(A, expert);
  return start_A ? at::cat({own, one(*start_A, expert)}, 0) : own;
}

at::Tensor Factors::up(int64_t expert) const {
  const auto own = one(B, expert);
  return start_B ? at::cat({own, one(*start_B, expert).neg()}, 1) : own;
}

Mask::Mask(double p, const Optional& seed) : active_(p > 0.0) {
  if (active_) {
    philox_.seed = static_cast<uint64_t>(seed->item<int64_t>());
    philox_.threshold = static_cast<uint32_t>(std::min(std::floor(p * 4294967296.0), 4294967295.0));
    philox_.keep_scale = static_cast<float>(p < 1.0 ? 1.0 / (1.0 - p) : 0.0);
  }
}

void Mask::apply_(const at::Tensor& values, int64_t row, int64_t left) const {
  auto philox = philox_;
  philox.first_column = left;
  auto* data = static_cast<char*>(values.mutable_data_ptr());
  for (int64_t i = 0; i < values.size(0); ++i) {
    auto* at = data + i * values.stride(0) * values.element_size();
    kernels().dropout_row(at, at, values.scalar_type(), row + i, values.size(1), philox);
  }
}

at::Tensor Operand::wide(
    int64_t begin, int64_t end, int64_t left, int64_t right, bool copied, Scratch& scratch) const {
  if (!copied && rows == nullptr && precision.model == precision.sums) {
    return matrix.narrow(0, begin, end - begin).narrow(1, left, right - left);
  }
  const auto out = scratch.matrix(kWide, end - begin, right - left, precision.sums);
  gather(*this, begin, end - begin, left, out);
  return out;
}

at::Tensor Operand::narrow(int64_t begin, int64_t end, Scratch& scratch) const {
  const int64_t count = end - begin;
  const int64_t padded = (count + kRowsTogether - 1) / kRowsTogether * kRowsTogether;
  if (rows == nullptr && count == padded) {
    return matrix.narrow(0, begin, count);
  }
  const auto out = scratch.matrix(kNarrow, padded, matrix.size(1), precision.model);
  gather(*this, begin, count, 0, out);
  out.narrow(0, count, padded - count).zero_();
  return out;
}

void multiply(
    const Precision& precision, const at::Tensor& out, const at::Tensor& rows, const at::Tensor& M,
    Scratch& scratch) {
  auto result = out;
  if (precision.model == precision.sums) {
    at::mm_out(result, rows, M);
    return;
  }
  if (precision.narrow) {
    auto product = scratch.matrix(kProduct, rows.size(0), M.size(1), precision.model);
    at::mm_out(product, rows, M);
    result.copy_(product.narrow(0, 0, out.size(0)));
    return;
  }
  const int64_t step = std::max<int64_t>(64, kTileEntries / std::max<int64_t>(1, M.size(0)));
  for (int64_t left = 0; left < M.size(1); left += step) {
    const int64_t count = std::min(step, M.size(1) - left);
    auto part = result.narrow(1, left, count);
    at::mm_out(part, rows, converted(M.narrow(1, left, count), scratch));
  }
}

}  // namespace lora::grouped
