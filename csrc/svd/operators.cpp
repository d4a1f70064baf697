// The operators. Arguments are checked in Python; here each weight or batch is given to its engine.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "aten_engine.h"
#include "cpu/serial_blas.h"
#include "cpu/svd_engine.h"
#include "krylov.h"
#include "minor.h"
#include "thin_qr.h"

namespace lora {
namespace {

using Factors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// U, S, V^T of the original weights from those of the tall ones, with signs such that the entry of
// largest magnitude of each u is positive.
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

using FactorsAndError = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

FactorsAndError leading(
    Engine& engine, int64_t rank, int64_t subspace, int64_t seed, double tolerance) {
  const auto found =
      leading_triplets(engine, rank, subspace, static_cast<uint64_t>(seed), tolerance);
  return std::tuple_cat(oriented(engine, found), std::make_tuple(estimate(engine, found)));
}

Factors trailing(Engine& engine, int64_t rank, int64_t seed) {
  return oriented(engine, trailing_triplets(engine, rank, static_cast<uint64_t>(seed)));
}

// Concatenates tuples of tensors along their leading dimension, which has one entry per weight.
template <typename... T>
std::tuple<T...> joined(const std::vector<std::tuple<T...>>& parts) {
  const auto member = [&](auto index) {
    std::vector<at::Tensor> tensors;
    for (const auto& part : parts) {
      tensors.push_back(std::get<index>(part));
    }
    return at::cat(tensors);
  };
  return [&]<size_t... index>(std::index_sequence<index...>) {
    return std::make_tuple(member(std::integral_constant<size_t, index>{})...);
  }(std::index_sequence_for<T...>{});
}

// One weight after another, each with all threads.
template <typename Run>
auto for_each_weight(at::TensorList weights, const Run& run) {
  const SerialBlas serial;
  std::vector<decltype(run(std::declval<Engine&>(), weights[0]))> parts;
  for (const auto& weight : weights) {
    const auto engine = cpu_engine(weight.detach());
    parts.push_back(run(*engine, weight.detach()));
  }
  return joined(parts);
}

// Batches on a GPU, with as many weights as fit into the work space at `bytes` each.
template <typename Run>
auto for_each_batch(at::TensorList weights, int64_t bytes, const Run& run) {
  constexpr int64_t kAtOnce = int64_t{4} << 30;
  const at::NoTF32Guard exact;  // TF32 would round W to 11 bits
  const auto step = static_cast<size_t>(std::max<int64_t>(1, kAtOnce / bytes));
  std::vector<decltype(run(std::declval<Engine&>(), std::vector<at::Tensor>()))> parts;
  for (size_t begin = 0; begin < weights.size(); begin += step) {
    std::vector<at::Tensor> batch;
    for (size_t k = begin; k < std::min(weights.size(), begin + step); ++k) {
      batch.push_back(weights[k].detach());
    }
    static const DeviceKernels none;
    const auto engine = aten_engine(batch, batch.front().is_cuda() ? cuda_kernels() : none);
    parts.push_back(run(*engine, batch));
  }
  return joined(parts);
}

// The bytes of a Krylov space: basis, operand and image, and a float64 copy for Gram matrices.
int64_t space_bytes(const at::Tensor& weight, int64_t rank, int64_t subspace) {
  const int64_t columns = subspace > 0 ? subspace : 6 * rank + 128;
  return 12 * (weight.size(0) + weight.size(1)) * columns + 1;
}

FactorsAndError randomized_svd_cpu(
    at::TensorList weights, int64_t rank, int64_t subspace, int64_t seed, double tol) {
  return for_each_weight(weights, [&](Engine& engine, const at::Tensor&) {
    return leading(engine, rank, subspace, seed, tol);
  });
}

Factors minor_svd_cpu(at::TensorList weights, int64_t rank, int64_t seed) {
  return for_each_weight(
      weights, [&](Engine& engine, const at::Tensor&) { return trailing(engine, rank, seed); });
}

std::tuple<at::Tensor, at::Tensor> thin_qr_cpu(at::TensorList weights, int64_t rank) {
  return for_each_weight(weights, [&](Engine& engine, const at::Tensor& weight) {
    return thin_qr(engine, weight.narrow(-1, 0, rank).unsqueeze(0));
  });
}

FactorsAndError randomized_svd_batched(
    at::TensorList weights, int64_t rank, int64_t subspace, int64_t seed, double tol) {
  const auto bytes = space_bytes(weights[0], rank, subspace);
  return for_each_batch(weights, bytes, [&](Engine& engine, const std::vector<at::Tensor>&) {
    return leading(engine, rank, subspace, seed, tol);
  });
}

Factors minor_svd_batched(at::TensorList weights, int64_t rank, int64_t seed) {
  // One at a time, because a factorization of one weight fills the device.
  constexpr auto kAll = std::numeric_limits<int64_t>::max();
  return for_each_batch(weights, kAll, [&](Engine& engine, const std::vector<at::Tensor>&) {
    return trailing(engine, rank, seed);
  });
}

std::tuple<at::Tensor, at::Tensor> thin_qr_batched(at::TensorList weights, int64_t rank) {
  const auto bytes = space_bytes(weights[0], rank, rank);
  return for_each_batch(weights, bytes, [&](Engine& engine, const std::vector<at::Tensor>& batch) {
    std::vector<at::Tensor> leading;
    for (const auto& weight : batch) {
      leading.push_back(weight.narrow(-1, 0, rank));
    }
    return thin_qr(engine, at::stack(leading));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  // The GPU's engine on a CPU, without its kernels, so that it can be tested without a GPU.
  const char* engine = std::getenv("LORA_KERNELS_SVD_ENGINE");
  const bool batched = engine != nullptr && std::string_view(engine) == "aten";
  m.impl("_randomized_svd", batched ? randomized_svd_batched : randomized_svd_cpu);
  m.impl("_minor_svd", batched ? minor_svd_batched : minor_svd_cpu);
  m.impl("_thin_qr", batched ? thin_qr_batched : thin_qr_cpu);
}

TORCH_LIBRARY_IMPL(lora, CUDA, m) {
  m.impl("_randomized_svd", randomized_svd_batched);
  m.impl("_minor_svd", minor_svd_batched);
  m.impl("_thin_qr", thin_qr_batched);
}

}  // namespace lora
