#include "triangular.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

#include "gemm.h"

namespace lora {
namespace {

constexpr int64_t kBlock = Triangle::kBlock;

Arithmetic arithmetic_of(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? Arithmetic::kDouble : Arithmetic::kFloat;
}

void multiply(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, const GemmOptions& options) {
  if (a.numel() > 0 && b.numel() > 0) {
    gemm(arithmetic_of(out), a, b, out, options);
  }
}

// Rows and columns [begin, end) of a matrix.
at::Tensor block(const at::Tensor& x, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  return x.narrow(0, row, rows).narrow(1, col, cols);
}

// The inverse of a diagonal block, computed in float64 so that it is as accurate as solving in the
// block's own dtype.
at::Tensor inverse_of(const at::Tensor& triangle, bool lower, bool unit) {
  const auto eye = at::eye(triangle.size(0), triangle.options().dtype(at::kDouble));
  return at::linalg_solve_triangular(
             triangle.to(at::kDouble), eye, /*upper=*/!lower, /*left=*/true, unit)
      .to(triangle.scalar_type())
      .contiguous();
}

// Exchanges rows as LAPACK's pivots (counted from 1) specify: row i with row pivots[i] - 1, in
// order.
void exchange_rows(at::Tensor rows, const at::Tensor& pivots, at::Tensor& order) {
  const auto* p = pivots.const_data_ptr<int32_t>();
  auto* at_row = order.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < pivots.numel(); ++i) {
    const int64_t j = p[i] - 1;
    if (i != j) {
      const auto kept = rows[i].clone();
      rows[i].copy_(rows[j]);
      rows[j].copy_(kept);
      std::swap(at_row[i], at_row[j]);
    }
  }
}

// L (unit diagonal) and U in one matrix, and the order of the rows.
std::pair<at::Tensor, at::Tensor> factorize(const at::Tensor& weight) {
  auto lu = weight.to(
      weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat, /*non_blocking=*/false,
      /*copy=*/true, at::MemoryFormat::Contiguous);
  const int64_t n = lu.size(0);
  auto order = at::arange(n, lu.options().dtype(at::kLong));
  const double floor =
      lu.abs().max().item<double>() * (lu.scalar_type() == at::kDouble ? 0x1p-53 : 0x1p-24);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t width = std::min(kBlock, n - begin), rest = n - begin - width;
    auto below = lu.narrow(0, begin, n - begin);
    auto panel = below.narrow(1, begin, width);
    auto [factors, pivots, info] = at::linalg_lu_factor_ex(panel);
    auto rows_order = order.narrow(0, begin, n - begin);
    exchange_rows(below, pivots, rows_order);
    auto diagonal = factors.narrow(0, 0, width).diagonal();
    diagonal.copy_(at::where(diagonal.abs() > floor, diagonal, floor));
    panel.copy_(factors);
    if (rest == 0) {
      break;
    }
    const auto inverse = inverse_of(block(lu, begin, width, begin, width), true, true);
    auto right = block(lu, begin, width, begin + width, rest);
    auto upper = at::empty({width, rest}, lu.options());
    multiply(inverse, right, upper, {});
    right.copy_(upper);
    multiply(
        block(lu, begin + width, rest, begin, width), upper,
        block(lu, begin + width, rest, begin + width, rest), {.alpha = -1.0, .accumulate = true});
  }
  return {lu, order};
}

}  // namespace

Triangle::Triangle(at::Tensor matrix, bool lower, bool unit)
    : matrix_(std::move(matrix)), lower_(lower) {
  const int64_t n = matrix_.size(0), count = (n + kBlock - 1) / kBlock;
  inverses_ = at::zeros({count, kBlock, kBlock}, matrix_.options());
  for (int64_t k = 0; k < count; ++k) {
    const int64_t begin = k * kBlock, width = std::min(kBlock, n - begin);
    block(inverses_[k], 0, width, 0, width)
        .copy_(inverse_of(block(matrix_, begin, width, begin, width), lower, unit));
  }
}

at::Tensor Triangle::solve(const at::Tensor& x, bool transposed) const {
  auto out = x.clone(at::MemoryFormat::Contiguous);
  const int64_t n = out.size(0), count = inverses_.size(0);
  const bool downward = lower_ != transposed;  // from the first block to the last
  for (int64_t step = 0; step < count; ++step) {
    const int64_t k = downward ? step : count - 1 - step;
    const int64_t begin = k * kBlock, width = std::min(kBlock, n - begin);
    const int64_t from = downward ? 0 : begin + width;
    const int64_t known = downward ? begin : n - from;
    auto rows = out.narrow(0, begin, width);
    const auto off_diagonal = transposed ? block(matrix_, from, known, begin, width)
                                         : block(matrix_, begin, width, from, known);
    multiply(
        off_diagonal, out.narrow(0, from, known), rows,
        {.transpose = transposed, .alpha = -1.0, .accumulate = true});
    auto solved = at::empty_like(rows);
    multiply(block(inverses_[k], 0, width, 0, width), rows, solved, {.transpose = transposed});
    rows.copy_(solved);
  }
  return out;
}

LuFactors::LuFactors(const at::Tensor& weight) : LuFactors(factorize(weight)) {}

LuFactors::LuFactors(std::pair<at::Tensor, at::Tensor> factors)
    : order_(factors.second),
      lower_(factors.first, /*lower=*/true, /*unit=*/true),
      upper_(factors.first, /*lower=*/false, /*unit=*/false) {}

at::Tensor LuFactors::solve(const at::Tensor& x, bool transposed) const {
  if (!transposed) {
    return upper_.solve(lower_.solve(x.index_select(0, order_), false), false);
  }
  const auto permuted = lower_.solve(upper_.solve(x, true), true);
  return at::empty_like(permuted).index_copy_(0, order_, permuted);
}

bool cholesky_(at::Tensor& matrix) {
  const int64_t n = matrix.size(0);
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t width = std::min(kBlock, n - begin), rest = n - begin - width;
    auto corner = block(matrix, begin, width, begin, width);
    const auto [factor, info] = at::linalg_cholesky_ex(corner);
    if (info.item<int32_t>() != 0) {
      return false;
    }
    corner.copy_(factor);
    if (rest == 0) {
      break;
    }
    auto left = block(matrix, begin + width, rest, begin, width);
    auto solved = at::empty({rest, width}, matrix.options());
    multiply(left, inverse_of(corner, true, false).t().contiguous(), solved, {});
    left.copy_(solved);
    multiply(
        solved, solved.t().contiguous(), block(matrix, begin + width, rest, begin + width, rest),
        {.alpha = -1.0, .accumulate = true, .lower = true});
  }
  return true;
}

}  // namespace lora
