#include "svd_engine.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "cholesky_inverse.h"
#include "gemm.h"
#include "normal.h"
#include "triangular.h"

namespace lora {
namespace {

class CpuEngine final : public Engine {
 public:
  explicit CpuEngine(const at::Tensor& weight)
      : Engine(
            1, weight.size(0), weight.size(1),
            weight.options().dtype(weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
        weight_(flipped ? weight.t() : weight),
        pairs_(can_pair(weight) && weight.numel() >= kRoundsFrom) {}

  bool rounds_operand() const override { return pairs_; }
  void round_no_longer() override { pairs_ = false; }
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

  at::Tensor wide_times(const at::Tensor& v) const override {
    auto out = at::empty({1, n, v.size(2)}, wide());
    gemm(Arithmetic::kDouble, weight_, unit_columns(v[0]), out[0], {.factor = factor_});
    return out;
  }

  at::Tensor wide_transposed_times(const at::Tensor& y) const override {
    auto out = at::empty({1, m, y.size(2)}, wide());
    gemm(
        Arithmetic::kDouble, weight_, unit_columns(y[0]), out[0],
        {.transpose = true, .factor = factor_});
    return out;
  }

  at::Tensor weight_gram() const override {
    auto out = at::zeros({1, m, m}, wide());
    // Block by block of rows, to avoid a converted copy of all of W.
    constexpr int64_t kRows = 1024;
    for (int64_t begin = 0; begin < n; begin += kRows) {
      const auto rows = weight_.narrow(0, begin, std::min(kRows, n - begin));
      const auto operand = rows.to(options.dtype()).contiguous();
      gemm(
          Arithmetic::kDouble, operand, operand, out[0],
          {.transpose = true, .alpha = factor_ * factor_, .accumulate = true, .lower = true});
    }
    auto lower = out.tril(-1);
    return out.tril_().add_(lower.mT());
  }

  at::Tensor wide_weight() const override {
    return (weight_.to(at::kDouble) * factor_).unsqueeze(0);
  }

  at::Tensor rescale() override {
    int exponent = 0;
    const double largest =
        std::max(std::abs(weight_.max().item<double>()), std::abs(weight_.min().item<double>()));
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

  at::Tensor rounded_product(const at::Tensor& a, const at::Tensor& b) const override {
    auto out = at::empty({1, a.size(1), b.size(2)}, options);
    const auto how = can_pair(a[0]) ? Arithmetic::kPairs : arithmetic();
    gemm(how, a[0], unit_columns(b[0].to(options.dtype())), out[0]);
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
    return cholesky_inverse_on_host(gram, tolerance);
  }

  std::tuple<at::Tensor, at::Tensor> eigh(const at::Tensor& matrices) const override {
    const auto [values, vectors] = at::linalg_eigh(matrices);
    return {values.flip(-1), vectors.flip(-1)};
  }

  bool factorize(double shift) override {
    if (n == m) {
      // The factor may exceed float32's range.
      lu_ = std::make_unique<LuFactors>(
          factor_ == 1.0 ? weight_ : wide_weight()[0].to(options.dtype()));
      return true;
    }
    if (!gram_.defined()) {
      gram_ = weight_gram()[0];
    }
    auto matrix = gram_.clone();
    matrix.diagonal().sub_(shift);
    cholesky_factor_.reset();
    if (!cholesky_(matrix)) {
      return false;
    }
    cholesky_factor_ = std::make_unique<Triangle>(matrix, /*lower=*/true, /*unit=*/false);
    return true;
  }

  at::Tensor solve(const at::Tensor& x, bool transposed) const override {
    return lu_->solve(x[0], transposed).unsqueeze(0);
  }

  at::Tensor solve_normal(const at::Tensor& x) const override {
    if (n == m) {
      return solve(solve(x, true), false);
    }
    const auto& factor = *cholesky_factor_;
    return factor.solve(factor.solve(x[0].to(at::kDouble), false), true)
        .unsqueeze(0)
        .to(options.dtype());
  }

  at::Tensor leading_vectors(const at::Tensor& matrices, int64_t r) const override {
    // MKL's ssyevd fails on some matrices of low rank ("too many repeated eigenvalues"), for
    // instance of rank 1 with 84 of 112 columns dropped.
    const auto diagonal = matrices.diagonal(0, -2, -1);
    const bool full = diagonal.min().item<double>() > 1e-6 * diagonal.max().item<double>();
    if (options.dtype() == at::kFloat && full) {
      // float32 takes half the time. Its vectors have an error of 1e-6 times the largest value over
      // the smallest one needed.
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
  std::unique_ptr<LuFactors> lu_;
  at::Tensor gram_;  // W^T W, stored for a second shift
  std::unique_ptr<Triangle> cholesky_factor_;
  bool pairs_;
  double factor_ = 1.0;
};

}  // namespace

std::unique_ptr<Engine> cpu_engine(const at::Tensor& weight) {
  return std::make_unique<CpuEngine>(weight);
}

}  // namespace lora
