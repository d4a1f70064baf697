#include "aten_engine.h"

#include <ATen/ATen.h>

#include <cmath>

#include "cpu/cholesky_inverse.h"
#include "cpu/normal.h"

namespace lora {
namespace {

// Larger matrices are given to the library's solver, one after another.
constexpr int64_t kLargestJacobi = 512;

class AtenEngine final : public Engine {
 public:
  AtenEngine(const std::vector<at::Tensor>& weights, const DeviceKernels& kernels)
      : Engine(
            static_cast<int64_t>(weights.size()), weights[0].size(0), weights[0].size(1),
            weights[0].options().dtype(
                weights[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
        kernels_(kernels),
        rounds_(weights[0].scalar_type() == at::kBFloat16 && n * m >= kRoundsFrom) {
    for (const auto& weight : weights) {
      weights_.push_back(flipped ? weight.t() : weight);
    }
  }

  bool rounds_operand() const override { return rounds_; }
  void round_no_longer() override { rounds_ = false; }
  bool host_sees_values() const override { return false; }

  at::Tensor times(const at::Tensor& v) const override { return pass(v, false, !rounds_); }
  at::Tensor transposed_times(const at::Tensor& y) const override {
    return pass(y, true, !rounds_);
  }
  at::Tensor exact_times(const at::Tensor& v) const override { return pass(v, false, true); }
  at::Tensor exact_transposed_times(const at::Tensor& y) const override {
    return pass(y, true, true);
  }

  at::Tensor wide_times(const at::Tensor& v) const override {
    auto out = at::empty({count, n, v.size(2)}, wide());
    for (int64_t k = 0; k < count; ++k) {
      out[k].copy_(at::mm(weights_[k].to(at::kDouble), v[k].to(at::kDouble)));
    }
    return out;
  }

  at::Tensor wide_transposed_times(const at::Tensor& y) const override {
    auto out = at::empty({count, m, y.size(2)}, wide());
    for (int64_t k = 0; k < count; ++k) {
      out[k].copy_(at::mm(weights_[k].t().to(at::kDouble), y[k].to(at::kDouble)));
    }
    return out;
  }

  at::Tensor weight_gram() const override {
    auto out = at::zeros({count, m, m}, wide());
    constexpr int64_t kRows = 1024;
    for (int64_t k = 0; k < count; ++k) {
      auto gram = out[k];
      for (int64_t begin = 0; begin < n; begin += kRows) {
        const auto rows = weights_[k].narrow(0, begin, std::min(kRows, n - begin)).to(at::kDouble);
        gram.addmm_(rows.t(), rows);
      }
    }
    return out;
  }

  at::Tensor wide_weight() const override { return at::stack(weights_).to(at::kDouble); }

  at::Tensor rescale() override {
    rounds_ = false;
    auto factors = at::ones({count}, wide().device(at::kCPU));
    for (int64_t k = 0; k < count; ++k) {
      int exponent = 0;
      const double largest = weights_[k].abs().max().item<double>();
      if (largest > 0) {
        std::frexp(largest, &exponent);
      }
      const auto scaled = weights_[k].to(at::kDouble) * std::ldexp(1.0, -exponent);
      weights_[k] = scaled.to(options.dtype());
      factors[k].fill_(std::ldexp(1.0, exponent));
    }
    return factors.to(options.device());
  }

  at::Tensor product(const at::Tensor& a, const at::Tensor& b) const override {
    return at::bmm(a.to(b.scalar_type()), b);
  }
  at::Tensor rounded_product(const at::Tensor& a, const at::Tensor& b) const override {
    return a.is_cuda() ? at::bmm(a, b, at::kFloat) : at::bmm(a.to(at::kFloat), b.to(at::kFloat));
  }
  void subtract_product_(at::Tensor& c, const at::Tensor& a, const at::Tensor& b) const override {
    c.baddbmm_(a, b, 1, -1);
  }
  at::Tensor gram(const at::Tensor& a, const at::Tensor& b) const override {
    return at::bmm(a.mT().to(at::kDouble), b.to(at::kDouble));
  }
  at::Tensor wide_product(const at::Tensor& a, const at::Tensor& b) const override {
    return at::bmm(a.to(at::kDouble), b.to(at::kDouble));
  }

  at::Tensor gaussian(int64_t rows, int64_t cols, uint64_t seed) const override {
    if (kernels_.gaussian != nullptr) {
      auto out = at::empty({rows, cols}, options.dtype(at::kFloat));
      kernels_.gaussian(out, seed);
      return out.to(options.dtype());
    }
    auto out = at::empty({rows, cols}, at::kFloat);
    fill_normal(out, seed);
    return out.to(options.device(), options.dtype().toScalarType());
  }

  at::Tensor cholesky_inverse(const at::Tensor& gram, double tolerance) const override {
    return kernels_.cholesky_inverse != nullptr ? kernels_.cholesky_inverse(gram, tolerance)
                                                : cholesky_inverse_on_host(gram, tolerance);
  }

  std::tuple<at::Tensor, at::Tensor> eigh(const at::Tensor& matrices) const override {
    if (kernels_.eigh != nullptr && matrices.size(-1) <= kLargestJacobi) {
      return kernels_.eigh(matrices);
    }
    const auto [values, vectors] = at::linalg_eigh(matrices);
    return {values.flip(-1), vectors.flip(-1)};
  }

  at::Tensor leading_vectors(const at::Tensor& matrices, int64_t r) const override {
    return std::get<1>(eigh(matrices)).narrow(-1, 0, r).to(options.dtype()).contiguous();
  }

  bool factorize(double shift) override {
    const auto& weight = weights_[0];
    if (n == m) {
      std::tie(factor_, pivots_, std::ignore) = at::linalg_lu_factor_ex(weight.to(options.dtype()));
      return true;
    }
    if (!gram_.defined()) {
      gram_ = weight_gram()[0];
    }
    auto shifted = gram_.clone();
    shifted.diagonal().sub_(shift);
    at::Tensor info;
    std::tie(factor_, info) = at::linalg_cholesky_ex(shifted);
    return info.item<int>() == 0;
  }

  at::Tensor solve(const at::Tensor& x, bool transposed) const override {
    return at::linalg_lu_solve(factor_, pivots_, x[0], /*left=*/true, transposed).unsqueeze(0);
  }

  at::Tensor solve_normal(const at::Tensor& x) const override {
    if (n == m) {
      return solve(solve(x, true), false);
    }
    return at::cholesky_solve(x[0].to(at::kDouble), factor_).unsqueeze(0).to(options.dtype());
  }

 private:
  // op(W) x. A bfloat16 weight is multiplied unconverted, with a float32 result: x is rounded to
  // bfloat16 or, for an exact product, split into three parts of 8 bits.
  at::Tensor pass(const at::Tensor& x, bool transpose, bool exact) const {
    const int64_t b = x.size(2);
    auto out = at::empty({count, transpose ? m : n, b}, options);
    for (int64_t k = 0; k < count; ++k) {
      const auto weight = transpose ? weights_[k].t() : weights_[k];
      auto result = out[k];
      if (weight.scalar_type() == at::kBFloat16) {
        const auto high = x[k].to(at::kBFloat16);
        if (!exact) {
          result.copy_(mixed(weight, high));
          continue;
        }
        const auto rest = x[k] - high;
        const auto middle = rest.to(at::kBFloat16);
        const auto low = (rest - middle).to(at::kBFloat16);
        const auto parts = mixed(weight, at::cat({high, middle, low}, 1));
        at::add_out(result, parts.narrow(1, 0, b), parts.narrow(1, b, b));
        result.add_(parts.narrow(1, 2 * b, b));
      } else {
        at::mm_out(result, weight.to(options.dtype()), x[k]);
      }
    }
    return out;
  }

  // bfloat16 operands, float32 result.
  static at::Tensor mixed(const at::Tensor& a, const at::Tensor& b) {
    return a.is_cuda() ? at::mm(a, b, at::kFloat) : at::mm(a.to(at::kFloat), b.to(at::kFloat));
  }

  const DeviceKernels& kernels_;
  std::vector<at::Tensor> weights_;  // [n, m] each, views
  bool rounds_;
  at::Tensor factor_, pivots_, gram_;
};

}  // namespace

DeviceKernels& cuda_kernels() {
  static DeviceKernels kernels;
  return kernels;
}

std::unique_ptr<Engine> aten_engine(
    const std::vector<at::Tensor>& weights, const DeviceKernels& kernels) {
  return std::make_unique<AtenEngine>(weights, kernels);
}

}  // namespace lora
