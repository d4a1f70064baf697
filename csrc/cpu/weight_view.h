// A 2-D weight in the order in which the kernels traverse it, and its division into equal items of
// work.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lora {

// The rows are the slow dimension in memory: a transposed weight is viewed as its transpose,
// without a copy.
struct WeightView {
  char* data;
  c10::ScalarType dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // in elements
  int64_t element_size;
  bool transposed;

  explicit WeightView(const at::Tensor& weight)
      : data(static_cast<char*>(weight.data_ptr())),
        dtype(weight.scalar_type()),
        rows(weight.size(0)),
        cols(weight.size(1)),
        row_stride(weight.stride(0)),
        col_stride(weight.stride(1)),
        element_size(static_cast<int64_t>(weight.element_size())),
        transposed(weight.stride(0) < weight.stride(1)) {
    if (transposed) {
      std::swap(rows, cols);
      std::swap(row_stride, col_stride);
    }
  }

  char* at(int64_t row, int64_t col) const {
    return data + (row * row_stride + col * col_stride) * element_size;
  }
};

// Rows [begin, end) of weight `index`. The work is divided by size alone, not by the number of
// threads, so that the bits of a result do not depend on it.
struct WorkItem {
  int64_t index;
  int64_t begin, end;
};

constexpr int64_t kItemElements = 1 << 16;

inline std::vector<WorkItem> cut_rows(const std::vector<WeightView>& views, int64_t row_multiple) {
  std::vector<WorkItem> items;
  for (size_t index = 0; index < views.size(); ++index) {
    const auto& view = views[index];
    const int64_t wanted = std::max<int64_t>(1, kItemElements / std::max<int64_t>(1, view.cols));
    const int64_t step = (wanted + row_multiple - 1) / row_multiple * row_multiple;
    for (int64_t begin = 0; begin < view.rows; begin += step) {
      items.push_back({static_cast<int64_t>(index), begin, std::min(view.rows, begin + step)});
    }
  }
  return items;
}

}  // namespace lora
