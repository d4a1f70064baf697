// The norms of the rows of W + s L R in float32, with float64 for the rows that need it.
//
// A float32 sum W + s L R has an error of about 2^-24 of its terms. The norm of a row has a smaller
// error, because the errors of its entries are independent. Where the sum is much smaller than its
// terms, that error is too large, and the row is computed again in float64.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "pack.h"
#include "squares.h"

namespace lora {
namespace {

// A row is settled if its squared norm is at least this share of its terms' squared norm, and far
// from the ends of float32's range.
constexpr double kSettled = 1.0 / 16, kLeastSquare = 1e-28, kMostSquare = 1e36;
// An entry is a sum of k + 1 terms with an error of about 2^-24 sqrt(k + 1) times their size. Over
// m entries these errors average out: with this multiple of (k + 1) / m as the share, the norm's
// error stays below 4e-7, three times its standard deviation.
constexpr double kSettledShare = 1.0 / 6;
// Rows that are computed again together: a multiple of a tile's rows and of a panel's columns.
constexpr int64_t kSettledRows = 32;

// The sum of squares of each row of a contiguous matrix [rows, columns], times `weights` [columns]
// if given. Added in a fixed order, so that it does not depend on the number of threads.
std::vector<double> squares_of_rows(const at::Tensor& matrix, const double* weights) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const auto* data = matrix.const_data_ptr<float>();
  std::vector<double> sums(rows);
  at::parallel_for(0, rows, 1 + 4096 / std::max<int64_t>(1, columns), [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const double x = data[i * columns + j];
        sums[i] += x * x * (weights == nullptr ? 1.0 : weights[j]);
      }
    }
  });
  return sums;
}

// The groups that have a row that is not settled; neighboring groups are joined.
std::vector<RowRange> unsettled(
    const RowSquares& found, const std::vector<double>& products, double share) {
  const auto rows = static_cast<int64_t>(found.sums.size());
  std::vector<RowRange> ranges;
  for (int64_t begin = 0; begin < rows; begin += kSettledRows) {
    const int64_t end = std::min(rows, begin + kSettledRows);
    bool settled = true;
    for (int64_t i = begin; i < end; ++i) {
      const double sum = found.sums[i], terms = found.sizes[i] + products[i];
      settled = settled && sum >= share * terms && sum >= kLeastSquare && sum <= kMostSquare;
    }
    if (settled) {
      continue;
    }
    if (!ranges.empty() && ranges.back().second == begin) {
      ranges.back().second = end;
    } else {
      ranges.emplace_back(begin, end);
    }
  }
  return ranges;
}

RowSquares in_double(
    const at::Tensor& weight, const at::Tensor& right, const at::Tensor& left, double scaling,
    const std::vector<RowRange>& ranges) {
  const auto scaled = left.to(at::kDouble).mul(scaling).contiguous();
  return row_squares(weight, scaled, right.to(at::kDouble).contiguous(), ranges);
}

std::vector<double> in_float(
    const at::Tensor& weight, const at::Tensor& right, const at::Tensor& left, double scaling) {
  const auto a = left.to(at::kFloat).mul(scaling).contiguous();
  const auto b = right.to(at::kFloat).contiguous();
  auto found = row_squares(weight, a, b, {{0, weight.size(0)}});
  const auto products = squares_of_rows(a, squares_of_rows(b, nullptr).data());
  const auto share = static_cast<double>(right.size(0) + 1) / static_cast<double>(right.size(1));
  const auto again = unsettled(found, products, std::max(kSettled, kSettledShare * share));
  if (!again.empty()) {
    const auto exact = in_double(weight, right, left, scaling, again);
    for (const auto& [begin, end] : again) {
      std::copy(exact.sums.begin() + begin, exact.sums.begin() + end, found.sums.begin() + begin);
    }
  }
  return std::move(found.sums);
}

at::Tensor row_norms(
    const at::Tensor& weight, const at::Tensor& right, const at::Tensor& left, double scaling) {
  const int64_t rows = weight.size(0);
  bool is_double = false;
  for (const auto* operand : {&weight, &right, &left}) {
    is_double = is_double || operand->scalar_type() == at::kDouble;
  }
  auto norms = at::zeros({rows}, weight.options().dtype(is_double ? at::kDouble : at::kFloat));
  if (weight.numel() == 0) {
    return norms;
  }
  const auto sums = is_double ? in_double(weight, right, left, scaling, {{0, rows}}).sums
                              : in_float(weight, right, left, scaling);
  AT_DISPATCH_FLOATING_TYPES(norms.scalar_type(), "row_norms", [&] {
    auto* out = norms.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < rows; ++i) {
      out[i] = static_cast<scalar_t>(std::sqrt(sums[i]));
    }
  });
  return norms;
}

}  // namespace

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  m.impl("_row_norms", row_norms);
}

}  // namespace lora
