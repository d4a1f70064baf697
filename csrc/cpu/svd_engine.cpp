#include "svd_engine.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"
#include "normal.h"

namespace lora {
namespace {

// X with X^T G X = 1, upper triangular; a column whose pivot is not above the tolerance is dropped.
void invert_cholesky(const double* gram, int64_t b, double tolerance, double* inverse) {
  std::vector<double> factor(gram, gram + b * b);  // becomes R, row by row
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
  // Row i of X is what R X = 1 leaves for it, from the last row up.
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

class CpuEngine final : public Engine {
 public:
  explicit CpuEngine(const at::Tensor& weight)
      : Engine(
            1, weight.size(0), weight.size(1),
            weight.options().dtype(
                weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
        weight_(flipped ? weight.t() : weight),
        pairs_(can_pair(weight)) {}

  bool rounds_operand() const override { return pairs_; }
  bool host_sees_values() const override { return true; }

  at::Tensor times(const at::Tensor& v) const override {
    return pass(v, pairs_ ? Arithmetic::kPairs : arithmetic(), false);
  }
  at::Tensor transposed_times(const at::Tensor& y) const override {
    return pass(y, pairs_ ? Arithmetic::kPairs : arithmetic(), true);
  }
  at::Tensor exact_times(const at::Tensor& v) const override {
    return pass(v, arithmetic(), false);
  }
  at::Tensor exact_transposed_times(const at::Tensor& y) const override {
    return pass(y, arithmetic(), true);
  }

  at::Tensor weight_gram() const override {
    auto out = at::zeros({1, m, m}, wide());
    // By blocks of rows: a second copy of all of W, widened, is never made.
    constexpr int64_t kRows = 4096;
    for (int64_t begin = 0; begin < n; begin += kRows) {
      const auto rows = weight_.narrow(0, begin, std::min(kRows, n - begin));
      const auto operand = rows.to(options.dtype()).contiguous();
      gemm(
          Arithmetic::kDouble, operand, operand, out[0],
          {.transpose = true, .alpha = factor_ * factor_, .accumulate = true});
    }
    return out;
  }

  at::Tensor wide_weight() const override {
    return (weight_.to(at::kDouble) * factor_).unsqueeze(0);
  }

  at::Tensor rescale() override {
    int exponent = 0;
    const double largest = std::max(
        std::abs(weight_.max().item<double>()), std::abs(weight_.min().item<double>()));
    if (largest > 0) {
      std::frexp(largest, &exponent);
    }
    factor_ = std::ldexp(1.0, -exponent);
    pairs_ = false;
    return at::full({1}, std::ldexp(1.0, exponent), wide());
  }

  at::Tensor product(const at::Tensor& a, const at::Tensor& b) const override {
    auto out = at::empty({1, a.size(1), b.size(2)}, options);
    gemm(arithmetic(), a[0], unit_columns(b[0]), out[0]);
    return out;
  }

  void subtract_product_(at::Tensor& c, const at::Tensor& a, const at::Tensor& b) const override {
    gemm(arithmetic(), a[0], unit_columns(b[0]), c[0], {.alpha = -1.0, .accumulate = true});
  }

  at::Tensor gram(const at::Tensor& a, const at::Tensor& b) const override {
    auto out = at::empty({1, a.size(2), b.size(2)}, wide());
    gemm(Arithmetic::kDouble, a[0], unit_columns(b[0]), out[0], {.transpose = true});
    return out;
  }

  at::Tensor wide_product(const at::Tensor& a, const at::Tensor& b) const override {
    auto out = at::empty({1, a.size(1), b.size(2)}, wide());
    gemm(Arithmetic::kDouble, a[0], unit_columns(b[0]), out[0]);
    return out;
  }

  at::Tensor gaussian(int64_t rows, int64_t cols, uint64_t seed) const override {
    auto out = at::empty({rows, cols}, options.dtype(at::kFloat));
    fill_normal(out, seed);
    return out.to(options.dtype());
  }

  at::Tensor cholesky_inverse(const at::Tensor& gram, double tolerance) const override {
    const auto source = gram.contiguous();
    auto out = at::empty_like(source);
    invert_cholesky(
        source.const_data_ptr<double>(), source.size(-1), tolerance,
        out.mutable_data_ptr<double>());
    return out;
  }

  std::tuple<at::Tensor, at::Tensor> eigh(const at::Tensor& matrices) const override {
    const auto [values, vectors] = at::linalg_eigh(matrices);
    return {values.flip(-1), vectors.flip(-1)};
  }

  at::Tensor leading_vectors(const at::Tensor& matrices, int64_t r) const override {
    if (options.dtype() == at::kFloat) {
      // Half the time. Its vectors are off by 1e-6 of largest over smallest value wanted.
      const auto [values, vectors] = at::linalg_eigh(matrices.to(at::kFloat));
      const int64_t size = values.size(-1);
      if (values[0][size - r].item<double>() > 1e-2 * values[0][size - 1].item<double>()) {
        return vectors.narrow(-1, size - r, r).flip(-1);
      }
    }
    const auto vectors = std::get<1>(eigh(matrices));
    return vectors.narrow(-1, 0, r).to(options.dtype()).contiguous();
  }

 private:
  Arithmetic arithmetic() const {
    return options.dtype() == at::kDouble ? Arithmetic::kDouble : Arithmetic::kFloat;
  }

  static at::Tensor unit_columns(const at::Tensor& x) {
    return x.stride(1) == 1 ? x : x.contiguous();
  }

  at::Tensor pass(const at::Tensor& x, Arithmetic how, bool transpose) const {
    auto out = at::empty({1, transpose ? m : n, x.size(2)}, options);
    gemm(how, weight_, unit_columns(x[0]), out[0], {.transpose = transpose, .factor = factor_});
    return out;
  }

  at::Tensor weight_;  // [n, m], a view
  bool pairs_;
  double factor_ = 1.0;
};

}  // namespace

std::unique_ptr<Engine> cpu_engine(const at::Tensor& weight) {
  return std::make_unique<CpuEngine>(weight);
}

}  // namespace lora
