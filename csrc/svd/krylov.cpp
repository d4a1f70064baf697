#include "krylov.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "orthonormal.h"
#include "settling.h"

namespace lora {
namespace {

struct Plan {
  int64_t block;     // columns that are multiplied at once
  int64_t subspace;  // of all blocks together
};

// Narrow blocks reach further for one dimension of the space, wide ones run at a higher rate. The
// dimensions give the residual and the worst value of 16 subspace iterations, or better
// (benchmarks/results/svd.csv).
Plan default_plan(int64_t r) {
  if (r <= 24) {
    return {16, 16 * 7};
  }
  if (r <= 96) {
    return {32, std::max<int64_t>(32 * 5, (5 * r + 31) / 32 * 32)};
  }
  return {64, (std::min(19 * r / 4, 11 * r / 4 + 256) + 31) / 32 * 32};
}

// Rounding to 8 bits leaves 2^-8 of the largest value in all directions: with one that stands out
// further than this, the others would drown.
constexpr double kSteepest = 64.0;

// What the estimate of the values' error is multiplied by: in the first steps they settle slower
// than geometrically, and were off by up to 2.5 times the plain estimate (Gaussian and clustered
// values, 900 x 700).
constexpr double kCaution = 3.0;
// The error of values in a space that rounded vectors chose, relative to the largest: 0.4e-6 to
// 2.0e-6, measured.
constexpr double kRounded = 0x1p-18;

at::Tensor diagonal_of(const at::Tensor& matrices) {
  return matrices.diagonal(0, -2, -1);
}

at::Tensor first_columns(const at::Tensor& block, int64_t count) {
  return block.size(-1) <= count ? block : block.narrow(-1, 0, count).contiguous();
}

// The entry of largest magnitude of each [count], wide, on the host. Not a square, which might
// underflow.
at::Tensor largest_of(const at::Tensor& blocks) {
  return blocks.abs().amax({-2, -1}).to(at::kDouble).cpu();
}

// The blocks of the Krylov space, and W's quadratic form on it.
class Space {
 public:
  // `wide_form`: the form's entries are summed in float64.
  Space(const Engine& engine, int64_t capacity, bool wide_form)
      : engine_(&engine),
        wide_form_(wide_form),
        basis_(at::empty({engine.count, engine.m, capacity}, engine.options)),
        image_(at::empty({engine.count, engine.n, capacity}, engine.options)),
        form_(at::zeros({engine.count, capacity, capacity}, engine.wide())) {
    if (engine.rounds_operand()) {
      rounded_ = at::empty(basis_.sizes(), engine.options.dtype(at::kBFloat16));
      excess_ = at::zeros_like(form_);
    }
  }

  int64_t size() const { return size_; }
  at::Tensor basis() const { return filled(basis_); }
  // What W was multiplied with to give the image: the basis, rounded where the engine does.
  at::Tensor operand() const { return filled(rounded_.defined() ? rounded_ : basis_); }
  at::Tensor image() const { return filled(image_); }

  // Takes an orthonormal block in; returns W times it.
  at::Tensor add(const at::Tensor& block) {
    const int64_t width = block.size(-1);
    basis_.narrow(-1, size_, width).copy_(block);
    at::Tensor rounded;
    if (rounded_.defined()) {
      rounded = block.to(at::kBFloat16);
      rounded_.narrow(-1, size_, width).copy_(rounded);
    }
    const auto image = engine_->times(rounded.defined() ? rounded.to(block.scalar_type()) : block);
    image_.narrow(-1, size_, width).copy_(image);
    size_ += width;
    columns_ = wide_form_ ? engine_->gram(this->image(), image)
                          : engine_->product(this->image().mT(), image);
    extend(form_, columns_);
    if (rounded.defined()) {
      auto mass = engine_->rounded_product(filled(rounded_).mT(), rounded).to(at::kDouble);
      auto own = diagonal_of(mass.narrow(-2, size_ - width, width));
      own.sub_(at::where(own > 0.5, 1.0, 0.0));
      extend(excess_, mass);
    }
    return image;
  }

  // How far W's largest value stands out from the middle one of those that the first block meets.
  double steepness() const {
    const auto squares = diagonal_of(corner(form_));
    const auto middle = std::get<0>(squares.median(-1)).clamp_min(1e-300);
    return std::sqrt((squares.amax(-1) / middle).max().item<double>());
  }

  // basis^T W^T W b for the last block b: what of W^T W b lies in the basis. Undefined where W^T
  // met another, rounded, image, and where rounding of the largest value is more than that of W^T W
  // b.
  at::Tensor inside() const { return rounded_.defined() || wide_form_ ? at::Tensor() : columns_; }

  // The form in orthonormal coordinates. Where W meets rounded vectors, their Gram matrix is 1 + E
  // with E a few 1e-3, and (1 + E)^-1/2 is taken to first order: what is left, E^2, only turns the
  // space that is chosen by as much, and its values by the square of that.
  at::Tensor form() const {
    auto form = corner(form_).clone();
    if (excess_.defined()) {
      const auto half = engine_->wide_product(corner(excess_), form);
      form.sub_(half + half.mT(), 0.5);
    }
    return form;
  }

  // The same with what is there raised by 1e-10 of the trace, so that columns that were dropped
  // come last; the values are not W's any more.
  at::Tensor raised_form() const {
    auto form = this->form();
    auto diagonal = diagonal_of(form);
    const auto raised = diagonal + 1e-10 * diagonal.sum(-1, /*keepdim=*/true);
    diagonal.copy_(at::where(diagonal > 0, raised, 0));
    return form;
  }

 private:
  at::Tensor filled(const at::Tensor& columns) const { return columns.narrow(-1, 0, size_); }
  at::Tensor corner(const at::Tensor& form) const {
    return form.narrow(-1, 0, size_).narrow(-2, 0, size_);
  }
  void extend(const at::Tensor& form, const at::Tensor& columns) const {
    const int64_t width = columns.size(-1), before = size_ - width;
    form.narrow(-1, before, width).narrow(-2, 0, size_).copy_(columns);
    form.narrow(-2, before, width).narrow(-1, 0, size_).copy_(columns.mT());
  }

  const Engine* engine_;
  bool wide_form_;
  int64_t size_ = 0;
  at::Tensor basis_;    // orthonormal, but for dropped columns, which are zero
  at::Tensor rounded_;  // the basis in bfloat16, where the engine rounds
  at::Tensor image_;    // W operand
  at::Tensor columns_;  // the last ones of the form
  at::Tensor form_;     // image^T image
  at::Tensor excess_;   // operand^T operand - 1, where the operand is rounded
};

// The triplets of a weight that is small, or most of whose triplets are wanted.
Triplets dense(const Engine& engine, int64_t r, uint64_t seed) {
  if (engine.options.dtype() == at::kDouble) {
    const auto all = exact_triplets(engine);
    return {all.U.narrow(-1, 0, r), all.S.narrow(-1, 0, r), all.V.narrow(-1, 0, r), {}};
  }
  const auto vectors = std::get<1>(engine.eigh(engine.weight_gram()));
  const auto basis = vectors.narrow(-1, 0, r).to(engine.options.dtype()).contiguous();
  return rayleigh_ritz(engine, basis, engine.exact_times(basis), seed);
}

}  // namespace

Triplets exact_triplets(const Engine& engine) {
  const auto [U, S, Vh] = at::linalg_svd(engine.wide_weight(), /*full_matrices=*/false);
  return {U.to(engine.options.dtype()), S, Vh.mT().to(engine.options.dtype()), {}};
}

Triplets rayleigh_ritz(
    const Engine& engine, const at::Tensor& basis, const at::Tensor& image, uint64_t seed) {
  const auto work = engine.options.dtype();
  auto mass = engine.gram(basis, basis);
  auto lengths = diagonal_of(mass);
  const auto missing = lengths < 0.25;  // their rows and columns are zero
  lengths.copy_(at::where(missing, 1, lengths));
  const auto factor = std::get<0>(at::linalg_cholesky_ex(mass));
  const auto half = at::linalg_solve_triangular(factor, engine.gram(image, image), /*upper=*/false);
  const auto form = at::linalg_solve_triangular(factor, half.mT(), /*upper=*/false);
  const auto [squares, vectors] = engine.eigh(form);
  const auto S = squares.clamp_min(0).sqrt();
  const auto rotation =
      at::linalg_solve_triangular(factor.mT(), vectors.contiguous(), /*upper=*/true);
  const auto inverse = at::where(S > 0, 1 / S, 0).unsqueeze(-2);
  auto U = engine.product(image, (rotation * inverse).to(work).contiguous());
  auto V = engine.product(basis, rotation.to(work).contiguous());
  // In a narrow range of values both are orthonormal as they come, to rounding.
  if (!engine.host_sees_values() ||
      !(S.narrow(-1, S.size(-1) - 1, 1) > 1e-3 * S.narrow(-1, 0, 1)).all().item<bool>()) {
    U = completed(engine, U, seed + 1);
    V = completed(engine, V, seed + 2);
  }
  return {U, S, V, {}};
}

Triplets leading_triplets(
    Engine& engine, int64_t r, int64_t subspace, uint64_t seed, double tolerance) {
  auto plan = default_plan(r);
  if (subspace > 0) {
    plan.block = std::clamp<int64_t>(subspace / 4, 1, plan.block);
  }
  const int64_t limit = subspace > 0 ? subspace : tolerance > 0 ? engine.m : plan.subspace;
  const auto sketch = engine.gaussian(engine.n, std::min(plan.block, engine.m), seed)
                          .expand({engine.count, -1, -1});
  auto block = engine.transposed_times(sketch);
  at::Tensor undo;
  auto sizes = largest_of(block);
  if (engine.host_sees_values() && engine.rounds_operand() && sizes.max().item<double>() == 0) {
    // A processor's bfloat16 products take subnormal numbers for zero.
    sizes = largest_of(engine.exact_transposed_times(sketch));
  }
  const auto* size = sizes.const_data_ptr<double>();
  if (!std::all_of(size, size + engine.count, in_range)) {
    undo = engine.rescale();
    block = engine.transposed_times(sketch);
  }
  // `rounding`: what the values are off by however large the space, relative to the largest.
  const auto finish = [&](Triplets found, const at::Tensor& error, double rounding) {
    if (error.defined()) {
      const auto largest = found.S.select(-1, 0).clamp_min(1e-300);
      const auto least = at::maximum(found.S.select(-1, -1), kLeastValue * largest);
      found.error = at::maximum(error, rounding * largest / least);
    }
    if (undo.defined()) {
      found.S = found.S * undo.unsqueeze(-1);
    }
    return found;
  };
  // In float32 the last step works in float64, and its own rounding is not seen. In float64 it is
  // LAPACK's SVD, or cuSOLVER's by Jacobi rotations: in 15 sweeps over a space of 1000 dimensions
  // their roundings add up, like a random walk, to √15000 = 122 eps; twice that is allowed for.
  const double wide = engine.host_sees_values() ? 64 : 256;
  const double fine = (engine.options.dtype() == at::kDouble ? wide : 16) * engine.epsilon();

  // A space of two thirds of all dimensions costs more than all of them at once.
  const int64_t room = std::min(limit, 2 * engine.m / 3);
  Settling settling(r, tolerance, kCaution);
  if (room < r || (room < limit && !settling.wanted())) {
    const auto exact = at::zeros({engine.count}, engine.wide());
    return finish(dense(engine, r, seed), settling.wanted() ? exact : at::Tensor(), fine);
  }
  // A GPU is asked only where it matters, and always sums in float64, so that the batch of a
  // float32 weight changes its values by rounding only (its last bits it may: batched cuBLAS and
  // cuSOLVER take other algorithms). A batch is as steep as its steepest weight.
  const bool host = engine.host_sees_values();
  block = first_columns(orthonormalized(engine, block), room);
  Space space(engine, room, /*wide_form=*/!host);
  auto image = space.add(block);
  double steep = 1.0;
  if (host || engine.rounds_operand()) {
    steep = space.steepness();
    if (steep > kSteepest) {
      engine.round_no_longer();
      space = Space(engine, room, /*wide_form=*/true);
      image = space.add(block);
    }
  }
  // An error in the basis turns the chosen space by as much; what that loses of the largest value
  // has to stay below the others.
  Orthogonality state{std::min(1e-4, 3e-3 / steep)};
  bool settled = settling.wanted() && settling.settled(space.form());
  while (space.size() < room && !settled) {
    block = engine.transposed_times(image);
    block = orthonormalized(engine, block, space.basis(), state, space.inside());
    block = first_columns(block, room - space.size());
    image = space.add(block);
    settled = settling.wanted() && settling.settled(space.form());
  }
  if (settling.wanted() && !settled && room < limit) {
    return finish(dense(engine, r, seed), at::zeros({engine.count}, engine.wide()), fine);
  }
  if (engine.options.dtype() == at::kDouble) {
    // Squares, as in the form, would lose what lies below 1e-8 of the largest value.
    const auto [U, S, Qh] = at::linalg_svd(space.image(), /*full_matrices=*/false);
    const auto V = engine.product(space.basis(), Qh.narrow(-2, 0, r).mT().contiguous());
    return finish({U.narrow(-1, 0, r), S.narrow(-1, 0, r), V, {}}, settling.error(), fine);
  }
  const auto chosen = engine.leading_vectors(space.raised_form(), r);
  const auto basis = engine.product(space.operand(), chosen);
  image = engine.product(space.image(), chosen);
  const double rounding = engine.rounds_operand() ? kRounded : fine;
  return finish(rayleigh_ritz(engine, basis, image, seed), settling.error(), rounding);
}

}  // namespace lora
