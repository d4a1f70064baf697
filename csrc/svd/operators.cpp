// The operators: checks were made above, here each weight or batch meets its engine.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>

#include "cpu/serial_blas.h"
#include "cpu/svd_engine.h"
#include "krylov.h"

namespace lora {
namespace {

using Factors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// U, S, V^T of the weights as they are, from those of the tall ones; the entry of largest magnitude
// of each u is positive.
Factors oriented(const Engine& engine, const Triplets& found) {
  const auto& left = engine.flipped ? found.V : found.U;
  const auto& right = engine.flipped ? found.U : found.V;
  const auto peak = left.gather(-2, left.abs().argmax(-2, /*keepdim=*/true));  // [count, 1, r]
  const auto sign = at::where(peak < 0, -1, 1).to(left.scalar_type());
  return {
      (left * sign).contiguous(), found.S.to(engine.options.dtype()).contiguous(),
      (right * sign).mT().contiguous()};
}

at::Tensor estimate(const Engine& engine, const Triplets& found) {
  if (found.error.defined()) {
    return found.error;
  }
  return at::full({engine.count}, std::numeric_limits<double>::quiet_NaN(), engine.wide());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> randomized_svd_cpu(
    at::TensorList weights, int64_t rank, int64_t subspace, int64_t seed, double tol) {
  const SerialBlas serial;
  std::vector<at::Tensor> U, S, Vh, error;
  for (const auto& weight : weights) {
    const auto engine = cpu_engine(weight.detach());
    const auto found = leading_triplets(*engine, rank, subspace, static_cast<uint64_t>(seed), tol);
    auto [u, s, vh] = oriented(*engine, found);
    U.push_back(u);
    S.push_back(s);
    Vh.push_back(vh);
    error.push_back(estimate(*engine, found));
  }
  return {at::cat(U), at::cat(S), at::cat(Vh), at::cat(error)};
}

}  // namespace

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  m.impl("_randomized_svd", randomized_svd_cpu);
}

}  // namespace lora
