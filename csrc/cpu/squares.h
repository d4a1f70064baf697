// The sums of squares of the rows of W + L R, without W + L R in memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace lora {

struct RowSquares {
  std::vector<double> sums;   // of the squares of W + L R
  std::vector<double> sizes;  // of the squares of W
};

using RowRange = std::pair<int64_t, int64_t>;  // [begin, end)

// W [n, m] has any floating dtype and strides. left [n, k] and right [k, m] are contiguous, float32
// or float64, and the computation is in their dtype. Only the rows in `ranges` are computed; the
// others stay 0. A result depends neither on the number of threads nor on the ranges.
RowSquares row_squares(
    const at::Tensor& weight, const at::Tensor& left, const at::Tensor& right,
    const std::vector<RowRange>& ranges);

}  // namespace lora
