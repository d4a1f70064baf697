#include "minor.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "orthonormal.h"
#include "settling.h"

namespace lora {
namespace {

// The inverse is applied until its values change by less than this, relative to each.
constexpr double kSettled = 3e-6;
constexpr int64_t kSpare = 16;  // additional vectors, because the last ones converge last
constexpr int64_t kProbes = 4;

int64_t block_of(int64_t r) {
  return r <= 24 ? 16 : r <= 96 ? 32 : 64;
}

// Columns [size - r, size) in reverse order.
at::Tensor last_first(const at::Tensor& t, int64_t r) {
  return t.narrow(-1, t.size(-1) - r, r).flip(-1).contiguous();
}

Triplets exact_trailing(const Engine& engine, int64_t r) {
  const auto all = exact_triplets(engine);
  return {last_first(all.U, r), last_first(all.S, r), last_first(all.V, r), {}};
}

// The Krylov space of the inverse, and the inverse's quadratic form on it.
class InverseSpace {
 public:
  InverseSpace(const Engine& engine, int64_t width, int64_t capacity, uint64_t seed)
      : engine_(engine),
        basis_(at::empty({1, engine.m, capacity}, engine.options)),
        form_(at::zeros({1, capacity, capacity}, engine.wide())),
        block_(engine.solve_normal(engine.gaussian(engine.m, width, seed).unsqueeze(0))) {}

  bool has_room() const { return size_ + block_.size(-1) <= basis_.size(-1); }

  void grow() {
    const int64_t width = block_.size(-1), before = size_;
    block_ = orthonormalized(engine_, block_, basis(), state_);
    basis_.narrow(-1, before, width).copy_(block_);
    size_ += width;
    block_ = engine_.solve_normal(block_);
    const auto columns = engine_.gram(basis(), block_);
    form_.narrow(-1, before, width).narrow(-2, 0, size_).copy_(columns);
    form_.narrow(-2, before, width).narrow(-1, 0, size_).copy_(columns.mT());
  }

  at::Tensor form() const {
    const auto form = form_.narrow(-1, 0, size_).narrow(-2, 0, size_);
    return (form + form.mT()) * 0.5;
  }

  // The vectors of the `count` largest values of the inverse.
  at::Tensor leading(int64_t count) const {
    const auto vectors = std::get<1>(engine_.eigh(form())).narrow(-1, 0, std::min(count, size_));
    return engine_.product(basis(), vectors.to(engine_.options.dtype()).contiguous());
  }

 private:
  at::Tensor basis() const { return basis_.narrow(-1, 0, size_); }

  const Engine& engine_;
  int64_t size_ = 0;
  Orthogonality state_{1e-4};
  at::Tensor basis_, form_, block_;
};

// Uses a shift just below the smallest eigenvalue of W^T W: the smallest values of a tall weight
// are close together, and without the shift the inverse hardly separates them (an error of 0.014
// after as many steps as give 5e-7 with it).
bool factorize_near_edge(Engine& engine, uint64_t seed) {
  if (!engine.factorize(0.0)) {
    return false;
  }
  InverseSpace space(engine, 16, 64, seed);
  while (space.has_room()) {
    space.grow();
  }
  // Not the eigenvalue itself, because the inverse's values are estimated from below.
  const auto form = space.form();
  if (!form.isfinite().all().item<bool>()) {
    return false;
  }
  const double edge = 1 / at::linalg_eigvalsh(form).max().item<double>();
  for (const double part : {0.98, 0.9, 0.5, 0.0}) {
    if (engine.factorize(part * edge)) {
      return true;
    }
  }
  return false;
}

// Two-sided Rayleigh-Ritz in float64 on orthonormal spaces: the r smallest triplets, ascending.
Triplets two_sided(
    const Engine& engine, const at::Tensor& left, const at::Tensor& right, int64_t r) {
  const auto form = engine.gram(left, engine.wide_times(right));
  const auto [P, S, Qh] = at::linalg_svd(form, /*full_matrices=*/false);
  const auto work = engine.options.dtype();
  return {
      engine.product(left, last_first(P, r).to(work)),
      last_first(S, r),
      engine.product(right, last_first(Qh.mT(), r).to(work)),
      {}};
}

bool orthonormal(const Engine& engine, const at::Tensor& q) {
  const auto gram = engine.gram(q, q);
  return (gram - at::eye(q.size(-1), gram.options())).abs().max().item<double>() <= 1e-5;
}

// Whether W V = U S and W^T U = V S to the accuracy of a converged space, with orthonormal U and V.
// The inverse of a singular W may have given parallel columns, of which only one was kept. `size`
// is ||W||.
bool holds(const Engine& engine, const Triplets& found, double size) {
  if (!orthonormal(engine, found.U) || !orthonormal(engine, found.V)) {
    return false;
  }
  const auto S = found.S.to(engine.options.dtype()).unsqueeze(-2);
  const auto residual = at::maximum(
      (engine.exact_times(found.V) - found.U * S).abs().amax(),
      (engine.exact_transposed_times(found.U) - found.V * S).abs().amax());
  return residual.item<double>() <= 0.05 * found.S.max().item<double>() + 1e-6 * size;
}

}  // namespace

Triplets trailing_triplets(Engine& engine, int64_t r, uint64_t seed) {
  const int64_t width = block_of(r);
  const int64_t room = std::min(engine.m / 2, std::max(20 * width, 6 * r)) / width * width;
  if (engine.options.dtype() == at::kDouble || room < r + 4 * width) {
    return exact_trailing(engine, r);
  }
  at::Tensor undo;
  const auto norm = [&] {
    const auto image = engine.exact_times(engine.gaussian(engine.m, kProbes, seed).unsqueeze(0));
    return std::sqrt(engine.gram(image, image).diagonal(0, -2, -1).sum().item<double>() / kProbes);
  };
  double size = norm();
  if (!in_range(size)) {
    undo = engine.rescale();
    size = norm();
  }
  const auto finish = [&](Triplets found) {
    if (undo.defined()) {
      found.S = found.S * undo.unsqueeze(-1);
    }
    return found;
  };
  const bool square = engine.n == engine.m;
  if (size == 0.0 || !(square ? engine.factorize(0.0) : factorize_near_edge(engine, seed))) {
    return finish(exact_trailing(engine, r));
  }
  InverseSpace space(engine, width, room, seed + 1);
  Settling settling(r, kSettled);
  bool settled = false;
  while (!settled && space.has_room()) {
    space.grow();
    const auto form = space.form();
    if (!form.isfinite().all().item<bool>()) {
      break;  // W is so close to singular that the inverse overflows
    }
    settled = settling.settled(form);
  }
  if (!settled) {
    return finish(exact_trailing(engine, r));
  }
  // One more half-step: without it, W v / s would have an error of the largest value over the
  // smallest.
  auto right = space.leading(r + kSpare);
  at::Tensor left;
  if (square) {
    left = orthonormalized(engine, engine.solve(right, /*transposed=*/true));
    right = orthonormalized(engine, engine.solve(left, /*transposed=*/false));
  } else {
    right = orthonormalized(engine, engine.solve_normal(right));
    left = orthonormalized(engine, engine.wide_times(right).to(engine.options.dtype()));
  }
  const auto found = two_sided(engine, left, right, r);
  return finish(holds(engine, found, size) ? found : exact_trailing(engine, r));
}

}  // namespace lora
