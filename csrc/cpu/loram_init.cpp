#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <optional>

#include "dst.h"

namespace lora {
namespace {

// Q[r] = ln r / ln min(n, m), with Q[1] set to Q[2]: else rank 1 would start at zero and never
// train.
double log_gain(int64_t rows, int64_t cols, int64_t rank) {
  const int64_t full = std::min(rows, cols);
  if (full <= 2) {
    return 1.0;
  }
  return std::log(static_cast<double>(std::max<int64_t>(rank, 2))) /
         std::log(static_cast<double>(full));
}

double largest(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return std::numeric_limits<at::Half>::max();
    case at::kBFloat16:
      return std::numeric_limits<at::BFloat16>::max();
    case at::kDouble:
      return std::numeric_limits<double>::max();
    default:
      return std::numeric_limits<float>::max();
  }
}

// An entry of the subtracted product is at most |coefficient| 2r / sqrt((n+1)(m+1)).
bool residual_fits(const at::Tensor& weight, double norm, double coefficient, int64_t rank) {
  const double bound =
      std::abs(coefficient) * 2.0 * static_cast<double>(rank) /
      std::sqrt(static_cast<double>(weight.size(0) + 1) * static_cast<double>(weight.size(1) + 1));
  const double limit = largest(weight.scalar_type());
  return bound + norm <= limit || bound + weight.abs().max().item<double>() <= limit;
}

// A float64 rounded to 41 significant bits, unless the weight is float64: see `shortened` in
// lora_kernels/ops/loram_init.py.
double shortened(double value, at::ScalarType dtype) {
  if (dtype == at::kDouble) {
    return value;
  }
  constexpr int64_t kHalf = 1 << 11;
  int64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + kHalf) & (-2 * kHalf);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

void loram_init_(
    at::TensorList weights, at::TensorList lora_A, at::TensorList lora_B, at::Tensor beta,
    int64_t rank, double scaling, bool check, const std::optional<at::Tensor>& known_stats) {
  std::map<const void*, size_t> seen;
  for (size_t k = 0; k < weights.size(); ++k) {
    const auto [first, is_new] = seen.try_emplace(weights[k].data_ptr(), k);
    TORCH_CHECK_VALUE(
        is_new, "loram_init: weights ", first->second, " and ", k,
        " share memory (tied?); pass it only once");
  }
  const auto stats = known_stats ? *known_stats : frobenius_stats(weights);
  const auto* sums = stats.data_ptr<double>();
  for (size_t k = 0; k < weights.size(); ++k) {
    const double sum_of_squares = sums[2 * k + 1];
    TORCH_CHECK_VALUE(
        !check || std::isfinite(sum_of_squares), "loram_init: weight ", k,
        " holds NaN or Inf (or its norm overflows float64); no weight was changed");
    TORCH_CHECK_VALUE(
        !check || sum_of_squares > 0, "loram_init: weight ", k,
        " is zero, so its magnitude gives no scale; no weight was changed");
  }
  auto* betas = beta.data_ptr<double>();
  std::vector<DstSubtraction> jobs;
  jobs.reserve(weights.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    const int64_t rows = weights[k].size(0), cols = weights[k].size(1);
    const double squared =
        std::sqrt(sums[2 * k + 1] * log_gain(rows, cols, rank) / static_cast<double>(rank));
    betas[k] = shortened(std::sqrt(squared), weights[k].scalar_type());
    jobs.push_back({weights[k], scaling * (betas[k] * betas[k]), rank, {rows, cols, 0, 0}});
    TORCH_CHECK_VALUE(
        !check || residual_fits(weights[k], std::sqrt(sums[2 * k + 1]), jobs[k].coefficient, rank),
        "loram_init: with scaling ", scaling, " the residual of weight ", k, " could overflow ",
        weights[k].scalar_type(), "; no weight was changed");
  }
  SineTables tables;
  for (size_t k = 0; k < weights.size(); ++k) {
    fill_dst_basis(lora_A[k].t(), weights[k].size(1), 0, betas[k], tables);
    fill_dst_basis(lora_B[k], weights[k].size(0), 0, betas[k], tables);
  }
  subtract_dst(jobs, tables);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  m.impl("_loram_init_", loram_init_);
}

}  // namespace lora
