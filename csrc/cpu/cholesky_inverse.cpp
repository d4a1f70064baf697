#include "cholesky_inverse.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace lora {
namespace {

// Upper-triangular X with X^T G X = 1. Columns with a pivot at or below the tolerance are dropped.
void invert_cholesky(const double* gram, int64_t b, double tolerance, double* inverse) {
  std::vector<double> factor(gram, gram + b * b);  // overwritten by R, row by row
  std::fill(inverse, inverse + b * b, 0.0);
  std::vector<double> pivot(b, 0.0);
  for (int64_t k = 0; k < b; ++k) {
    double* row = factor.data() + k * b;
    if (!(row[k] > tolerance)) {
      std::fill(row, row + b, 0.0);
      continue;
    }
    pivot[k] = std::sqrt(row[k]);
    for (int64_t j = k; j < b; ++j) {
      row[j] /= pivot[k];
    }
    for (int64_t i = k + 1; i < b; ++i) {
      double* below = factor.data() + i * b;
      for (int64_t j = i; j < b; ++j) {
        below[j] -= row[i] * row[j];
      }
    }
  }
  // Solves R X = 1 for the rows of X, from the last to the first.
  for (int64_t i = b - 1; i >= 0; --i) {
    if (pivot[i] == 0.0) {
      continue;
    }
    const double* row = factor.data() + i * b;
    double* out = inverse + i * b;
    for (int64_t k = i + 1; k < b; ++k) {
      const double* known = inverse + k * b;
      if (row[k] != 0.0) {
        for (int64_t j = k; j < b; ++j) {
          out[j] -= row[k] * known[j];
        }
      }
    }
    out[i] = 1.0;
    for (int64_t j = i; j < b; ++j) {
      out[j] = pivot[j] == 0.0 ? 0.0 : out[j] / pivot[i];
    }
  }
}

}  // namespace

at::Tensor cholesky_inverse_on_host(const at::Tensor& gram, double tolerance) {
  const auto source = gram.cpu().contiguous();
  auto out = at::empty_like(source);
  const int64_t b = source.size(-1);
  for (int64_t k = 0; k < source.size(0); ++k) {
    invert_cholesky(
        source.const_data_ptr<double>() + k * b * b, b, tolerance,
        out.mutable_data_ptr<double>() + k * b * b);
  }
  return out.to(gram.device());
}

}  // namespace lora
