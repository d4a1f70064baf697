#include "grouped_rows.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <cstring>

namespace lora::grouped {
namespace {

template <typename T>
void add_rows(
    const at::Tensor& product, const int64_t* begin, const int64_t* end, T* sum, int64_t columns) {
  const auto* data = product.const_data_ptr<T>();
  std::fill(sum, sum + columns, T(0));
  for (const auto* p = begin; p != end; ++p) {
    const T* row = data + *p * product.stride(0);
    for (int64_t j = 0; j < columns; ++j) {
      sum[j] += row[j];
    }
  }
}

template <typename T>
void add_up_typed(
    const at::Tensor& product, const std::vector<int64_t>& firsts,
    const std::vector<int64_t>& products, const at::Tensor& out) {
  const int64_t columns = out.size(1);
  const bool direct = out.scalar_type() == product.scalar_type();
  at::parallel_for(0, out.size(0), 16, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto sums = direct ? out.narrow(0, first, last - first)
                             : at::empty({last - first, columns}, product.options());
    for (int64_t t = first; t < last; ++t) {
      add_rows<T>(
          product, products.data() + firsts[t], products.data() + firsts[t + 1],
          sums.mutable_data_ptr<T>() + (t - first) * sums.stride(0), columns);
    }
    if (!direct) {
      out.narrow(0, first, last - first).copy_(sums);
    }
  });
}

}  // namespace

Origins::Origins(const Groups& groups, int64_t tokens)
    : firsts_(tokens + 1), products_(groups.used()) {
  for (int64_t i = 0; i < groups.used(); ++i) {
    ++firsts_[groups.rows()[i] + 1];
  }
  for (int64_t t = 0; t < tokens; ++t) {
    firsts_[t + 1] += firsts_[t];
  }
  auto next = firsts_;
  for (int64_t i = 0; i < groups.used(); ++i) {
    products_[next[groups.rows()[i]]++] = i;
  }
}

void Origins::add_up(const at::Tensor& product, const at::Tensor& out) const {
  if (product.scalar_type() == at::kDouble) {
    add_up_typed<double>(product, firsts_, products_, out);
  } else {
    add_up_typed<float>(product, firsts_, products_, out);
  }
}

}  // namespace lora::grouped
