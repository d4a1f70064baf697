#include "orthonormal.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace lora {
namespace {

// Squared sines. In float32, a column whose distance from the span of the others is less than 1e-6
// of its length is rounding noise. In the second pass, so is a column that again loses most of its
// length.
constexpr double kIndependent = 1e-12, kStable = 0.25;

constexpr int kRepeats = 3;

at::Tensor squared_lengths(const at::Tensor& gram) {
  return gram.diagonal(0, -2, -1);
}

at::Tensor to_work(const Engine& engine, const at::Tensor& wide) {
  return wide.to(engine.options.dtype());
}

// With Householder reflections: a float64 Gram matrix hides sines below 1e-8, which are not noise
// in a float64 weight.
at::Tensor reflected(const Engine& engine, at::Tensor block, const at::Tensor& basis) {
  // From columns of zeros, the reflections would make unit vectors, the same in every block. Random
  // noise of rounding size, with a different seed in every block, gives columns that add nothing
  // separate directions. After the first pass such a column is noise, partly within the basis
  // again.
  constexpr int kPasses = 3;
  const auto lengths = at::linalg_vector_norm(block, 2, {-2}, /*keepdim=*/true);
  const auto noise = engine.gaussian(block.size(-2), block.size(-1), basis.size(-1));
  block = block * at::where(lengths > 0, 1 / lengths, 0);
  block.add_(noise, engine.epsilon() / std::sqrt(block.size(-2)));
  for (int pass = 0; pass < kPasses; ++pass) {
    if (basis.size(-1) > 0) {
      engine.subtract_product_(block, basis, engine.product(basis.mT(), block));
    }
    block = std::get<0>(at::linalg_qr(block)).contiguous();
  }
  return block;
}

}  // namespace

at::Tensor orthonormalized(
    const Engine& engine, at::Tensor block, const at::Tensor& basis, Orthogonality& state,
    at::Tensor inside) {
  if (engine.options.dtype() == at::kDouble) {
    return reflected(engine, std::move(block), basis);
  }
  const bool projected = basis.size(-1) > 0;
  at::Tensor lengths;  // squared, of the columns before the projection
  const auto project = [&] {
    if (!projected) {
      return;
    }
    if (!inside.defined()) {
      inside = engine.product(basis.mT(), block);  // [k, b]
    }
    engine.subtract_product_(block, basis, inside);
    if (!lengths.defined()) {
      lengths = squared_lengths(engine.gram(inside, inside));
    }
    inside.reset();
  };
  project();
  auto gram = engine.gram(block, block);
  lengths = projected ? lengths + squared_lengths(gram) : squared_lengths(gram).clone();
  const auto scale = at::where(lengths > 0, lengths.rsqrt(), 0);
  gram.mul_(scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2));
  auto inverse = engine.cholesky_inverse(gram, kIndependent);
  bool twice = true;
  if (engine.host_sees_values()) {
    const double growth = inverse.diagonal(0, -2, -1).max().item<double>();
    const double once = growth * (state.error + engine.epsilon());
    twice = once > state.tolerated;
    state.error = twice ? state.error : std::max(state.error, once);
  }
  block = engine.product(block, to_work(engine, inverse * scale.unsqueeze(-1)));
  if (twice) {
    project();
    inverse = engine.cholesky_inverse(engine.gram(block, block), kStable);
    block = engine.product(block, to_work(engine, inverse));
  }
  return block;
}

at::Tensor orthonormalized(const Engine& engine, at::Tensor block) {
  Orthogonality exact;
  const auto none = block.narrow(-1, 0, 0);
  return orthonormalized(engine, std::move(block), none, exact);
}

at::Tensor completed(const Engine& engine, at::Tensor q, uint64_t seed) {
  const int64_t size = q.size(-2), rank = q.size(-1);
  if (engine.host_sees_values()) {
    const auto gram = engine.gram(q, q);
    const auto error = (gram - at::eye(rank, gram.options())).abs().max().item<double>();
    if (error <= 16 * engine.epsilon()) {
      return q;
    }
  }
  // Block by block from the left, because the columns on the right are less certain.
  auto done = at::zeros_like(q);
  for (int64_t begin = 0; begin < rank; begin += kMaxBlock) {
    const int64_t width = std::min(kMaxBlock, rank - begin);
    const auto before = done.narrow(-1, 0, begin);
    Orthogonality exact;
    auto block = orthonormalized(engine, q.narrow(-1, begin, width).clone(), before, exact);
    // A random direction may be dropped too, if the space is almost complete.
    for (int repeat = 0; repeat < kRepeats; ++repeat) {
      const auto missing = squared_lengths(engine.gram(block, block)) < 0.5;  // [count, width]
      if (engine.host_sees_values() && !missing.any().item<bool>()) {
        break;
      }
      const auto random = engine.gaussian(size, width, seed + begin + repeat);
      const auto filled = at::where(missing.unsqueeze(-2), random.unsqueeze(0), block);
      block = orthonormalized(engine, filled.contiguous(), before, exact);
    }
    done.narrow(-1, begin, width).copy_(block);
  }
  return done;
}

}  // namespace lora
