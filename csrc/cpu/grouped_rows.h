// The sum of the rows of a product that came from the same row of x.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "grouped.h"

namespace lora::grouped {

// For each row of x, the rows of the product that it became, in ascending order.
class Origins {
 public:
  Origins(const Groups& groups, int64_t tokens);

  // out[t, :] = the sum of the rows of `product` (float32 or float64) that come from row t, added
  // in ascending order and rounded once to out's dtype. The last strides are 1.
  void add_up(const at::Tensor& product, const at::Tensor& out) const;

 private:
  std::vector<int64_t> firsts_;  // [T + 1], into products_
  std::vector<int64_t> products_;
};

}  // namespace lora::grouped
