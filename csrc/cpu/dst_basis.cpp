#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <type_traits>

#include "dst.h"
#include "simd/kernels.h"
#include "sine.h"

namespace lora {
namespace {

constexpr int64_t kRowGrainElements = 1 << 14;

// The table index (i+1)(j+1) mod 2n is an exact integer, advanced along the row.
template <typename T>
void fill_row(
    T* out, int64_t stride, const std::vector<T>& table, int64_t row, int64_t first_col,
    int64_t cols) {
  const auto period = static_cast<int64_t>(table.size());
  const int64_t step = (row + 1) % period;
  int64_t index = step * ((first_col + 1) % period) % period;
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1) {
      return kernels().gather_row(
          table.data(), static_cast<uint32_t>(period), static_cast<uint32_t>(index),
          static_cast<uint32_t>(step), out, cols);
    }
  }
  for (int64_t j = 0; j < cols; ++j) {
    out[j * stride] = table[index];
    index += step;
    index -= index >= period ? period : 0;
  }
}

}  // namespace

void fill_dst_basis(
    const at::Tensor& out, int64_t size, int64_t offset, std::optional<double> scale,
    SineTables& tables) {
  const double norm = std::sqrt(2.0 / static_cast<double>(size + 1));
  const auto& sines = tables.sines(size + 1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), "dst_basis", [&] {
    std::vector<scalar_t> table(sines.size());
    for (size_t p = 0; p < sines.size(); ++p) {
      const double value = norm * sines[p];
      table[p] = static_cast<scalar_t>(scale ? value * *scale : value);
    }
    // Fills along the faster dimension; entry (i, j) is symmetric in i + 1 and j + 1.
    const bool tall = out.stride(0) >= out.stride(1);
    const int64_t rows = tall ? out.size(0) : out.size(1);
    const int64_t cols = tall ? out.size(1) : out.size(0);
    const int64_t row_stride = tall ? out.stride(0) : out.stride(1);
    const int64_t col_stride = tall ? out.stride(1) : out.stride(0);
    auto* data = out.data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kRowGrainElements / std::max<int64_t>(1, cols));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        fill_row(
            data + i * row_stride, col_stride, table, (tall ? offset : 0) + i, tall ? 0 : offset,
            cols);
      }
    });
  });
}

namespace {

void dst_basis_(
    const at::Tensor& out, int64_t size, int64_t offset, const std::optional<at::Tensor>& scale) {
  SineTables tables;
  fill_dst_basis(
      out, size, offset, scale ? std::optional(scale->item<double>()) : std::nullopt, tables);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  m.impl("_dst_basis_", dst_basis_);
}

}  // namespace lora
