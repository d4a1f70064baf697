#include "krylov.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "certificate.h"
#include "orthonormal.h"
#include "settling.h"

namespace lora {
namespace {

struct Plan {
  int64_t block;     // columns multiplied at a time
  int64_t subspace;  // total dimension of all blocks
};

// Narrow blocks give more accuracy per dimension of the space, wide ones run faster. With these
// dimensions the residual and the worst value are at least as good as with 16 subspace iterations
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

// Rounding to 8 bits adds an error of 2^-8 of the largest value in all directions. Values smaller
// than the largest by more than this factor would be lost in that error.
constexpr double kSteepest = 64.0;

// The smallest number of additional triplets, which separate the wanted ones from the next values
// in the bound.
constexpr int64_t kBesides = 32;

// Below this tolerance, vectors are not rounded to 8 bits. The rounding leaves a part of W^T W V
// outside V that is 1e-3 of it; the square of that, over the gap and twice the tolerance, has to be
// small.
constexpr double kFinest = 1e-4;

at::Tensor diagonal_of(const at::Tensor& matrices) {
  return matrices.diagonal(0, -2, -1);
}

at::Tensor first_columns(const at::Tensor& block, int64_t count) {
  return block.size(-1) <= count ? block : block.narrow(-1, 0, count).contiguous();
}

// The largest magnitude of an entry, for each weight [count], wide, on the host. (Its square might
// underflow.)
at::Tensor largest_of(const at::Tensor& blocks) {
  return blocks.abs().amax({-2, -1}).to(at::kDouble).cpu();
}

// The blocks of the Krylov space, and W's quadratic form on it.
class Space {
 public:
  // `wide_form`: whether the entries of the form are summed in float64.
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
  // The operand by which W was multiplied to give the image: the basis, rounded if the engine
  // rounds.
  at::Tensor operand() const { return filled(rounded_.defined() ? rounded_ : basis_); }
  at::Tensor image() const { return filled(image_); }

  // Adds an orthonormal block to the space; returns W times it.
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

  // W's largest value divided by the median of the values seen by the first block.
  double steepness() const {
    const auto squares = diagonal_of(corner(form_));
    const auto middle = std::get<0>(squares.median(-1)).clamp_min(1e-300);
    return std::sqrt((squares.amax(-1) / middle).max().item<double>());
  }

  // basis^T W^T W b for the last block b: the part of W^T W b within the basis. Undefined if W^T
  // was multiplied by a different, rounded image, or if the rounding error of the largest value
  // exceeds that of W^T W b.
  at::Tensor inside() const {
    if (rounded_.defined() || wide_form_) {
      return {};
    }
    return steepness_of_last() > kSteepest ? at::Tensor() : columns_;
  }

  // The largest value divided by the median of the values seen by the last block.
  double steepness_of_last() const {
    const auto squares = diagonal_of(corner(form_));
    const auto own = squares.narrow(-1, size_ - columns_.size(-1), columns_.size(-1));
    const auto middle = std::get<0>(own.median(-1));
    const auto largest = squares.amax(-1).clamp_min(1e-300);
    return std::sqrt((largest / at::where(middle > 0, middle, largest)).max().item<double>());
  }

  // Whether all of these values, in descending order, exceed the rounding error of the form.
  bool shows_all(const at::Tensor& values) const {
    return wide_form_ ||
           (kSteepest * values.select(-1, -1) > values.select(-1, 0)).all().item<bool>();
  }
  void widen() {
    wide_form_ = true;
    corner(form_).copy_(engine_->gram(image(), image()));
  }

  // The form in orthonormal coordinates. Where the basis is rounded, its Gram matrix is 1 + E with
  // E about 1e-3, and (1 + E)^-1/2 is computed to first order. The error, E^2, rotates the selected
  // space by that much and changes its values by the square of it.
  at::Tensor form() const {
    auto form = corner(form_).clone();
    if (excess_.defined()) {
      const auto half = engine_->wide_product(corner(excess_), form);
      form.sub_(half + half.mT(), 0.5);
    }
    return form;
  }

  // The form in orthonormal coordinates, with nonzero columns raised by 1e-10 of the trace, so that
  // dropped columns come last; its values are no longer W's.
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
  at::Tensor basis_;    // orthonormal, except for dropped columns, which are zero
  at::Tensor rounded_;  // the basis in bfloat16, where the engine rounds
  at::Tensor image_;    // W operand
  at::Tensor columns_;  // the last columns of the form
  at::Tensor form_;     // image^T image
  at::Tensor excess_;   // operand^T operand - 1, where the operand is rounded
};

// Orthonormalizes `basis` by its Gram matrix, except for zero columns, and makes the images of the
// result orthogonal. Returns the squared lengths of the images, descending, and the rotation, in
// float64.
std::tuple<at::Tensor, at::Tensor> ritz_rotation(
    const Engine& engine, const at::Tensor& basis, const at::Tensor& image) {
  auto mass = engine.gram(basis, basis);
  auto lengths = diagonal_of(mass);
  const auto missing = lengths < 0.25;  // their rows and columns are zero
  lengths.copy_(at::where(missing, 1, lengths));
  const auto factor = std::get<0>(at::linalg_cholesky_ex(mass));
  const auto half = at::linalg_solve_triangular(factor, engine.gram(image, image), /*upper=*/false);
  const auto form = at::linalg_solve_triangular(factor, half.mT(), /*upper=*/false);
  const auto [squares, vectors] = engine.eigh(form);
  const auto rotation =
      at::linalg_solve_triangular(factor.mT(), vectors.contiguous(), /*upper=*/true);
  return {squares.clamp_min(0), rotation};
}

// If the range of the values is narrow, U and V are orthonormal to within rounding already.
Triplets with_orthonormal(
    const Engine& engine, at::Tensor U, const at::Tensor& S, at::Tensor V, uint64_t seed) {
  if (!engine.host_sees_values() ||
      !(S.narrow(-1, S.size(-1) - 1, 1) > 1e-3 * S.narrow(-1, 0, 1)).all().item<bool>()) {
    U = completed(engine, U, seed + 1);
    V = completed(engine, V, seed + 2);
  }
  return {U, S, V, {}};
}

// The rounding error of values computed in this dtype, relative to the largest. In float64, the
// errors of LAPACK's SVD, or of cuSOLVER's with Jacobi rotations: in 15 sweeps over a space of 1000
// dimensions, errors add up like a random walk, to sqrt(15000) = 122 eps; the bound is twice that.
double rounding_of(const Engine& engine, at::ScalarType dtype) {
  if (dtype != at::kDouble) {
    return 0x1p-20;
  }
  return engine.host_sees_values() ? 0x1p-47 : 0x1p-45;
}

Ritz ritz_on(const Engine& engine, const at::Tensor& basis, const at::Tensor& image) {
  const auto [squares, rotation] = ritz_rotation(engine, basis, image);
  if (image.scalar_type() == at::kDouble) {
    return {
        squares.sqrt(), engine.wide_product(basis, rotation), engine.wide_product(image, rotation)};
  }
  const auto turned = rotation.to(image.scalar_type()).contiguous();
  return {squares.sqrt(), engine.product(basis, turned), engine.product(image, turned), {}};
}

Triplets triplets_of(const Engine& engine, const Ritz& ritz, int64_t r, uint64_t seed) {
  const auto work = engine.options.dtype();
  const auto S = ritz.values.narrow(-1, 0, r);
  if (ritz.left.defined()) {
    return {ritz.left.narrow(-1, 0, r), S, ritz.vectors.narrow(-1, 0, r), {}};
  }
  const auto inverse = at::where(S > 0, 1 / S, 0).unsqueeze(-2);
  const auto U = (ritz.images.narrow(-1, 0, r) * inverse).to(work).contiguous();
  const auto V = ritz.vectors.narrow(-1, 0, r).to(work).contiguous();
  return with_orthonormal(engine, U, S, V, seed);
}

// The largest relative error of the values, given their upper bounds.
at::Tensor relative_error(const at::Tensor& upper, const at::Tensor& values, double rounding) {
  const auto largest = values.narrow(-1, 0, 1).clamp_min(1e-300);
  const auto size = values.maximum(kLeastValue * largest);
  return (((upper - values).clamp_min(0) + rounding * largest) / size).amax(-1);
}

// The triplets of a weight that is small, or of which most triplets are wanted. With a tolerance, a
// bound on their error is computed too.
Triplets dense(const Engine& engine, int64_t r, uint64_t seed, double tolerance) {
  const auto exact = [&] {
    const auto all = exact_triplets(engine);
    const auto S = all.S.narrow(-1, 0, r);
    return Triplets{
        all.U.narrow(-1, 0, r), S, all.V.narrow(-1, 0, r),
        tolerance > 0 ? relative_error(S, S, rounding_of(engine, at::kDouble)) : at::Tensor()};
  };
  if (engine.options.dtype() == at::kDouble) {
    return exact();
  }
  const auto [squares, vectors] = engine.eigh(engine.weight_gram());
  const auto basis = vectors.narrow(-1, 0, r).to(engine.options.dtype()).contiguous();
  if (tolerance == 0) {
    return rayleigh_ritz(engine, basis, engine.exact_times(basis), seed);
  }
  // The rounding error of sums of up to n products and of LAPACK, with a margin: 128 eps of the
  // largest eigenvalue.
  constexpr double kGramRounding = 0x1p-46;
  const auto ritz = ritz_on(engine, basis, engine.wide_times(basis));
  const auto upper =
      (squares.narrow(-1, 0, r).clamp_min(0) + kGramRounding * squares.narrow(-1, 0, 1)).sqrt();
  const auto error = relative_error(upper, ritz.values, rounding_of(engine, at::kDouble));
  if (!(error <= std::max(tolerance, engine.epsilon())).all().item<bool>()) {
    return exact();
  }
  auto found = triplets_of(engine, ritz, r, seed);
  found.error = error;
  return found;
}

}  // namespace

Triplets exact_triplets(const Engine& engine) {
  const auto [U, S, Vh] = at::linalg_svd(engine.wide_weight(), /*full_matrices=*/false);
  return {U.to(engine.options.dtype()), S, Vh.mT().to(engine.options.dtype()), {}};
}

Triplets rayleigh_ritz(
    const Engine& engine, const at::Tensor& basis, const at::Tensor& image, uint64_t seed) {
  const auto work = engine.options.dtype();
  const auto [squares, rotation] = ritz_rotation(engine, basis, image);
  const auto S = squares.sqrt();
  const auto inverse = at::where(S > 0, 1 / S, 0).unsqueeze(-2);
  const auto U = engine.product(image, (rotation * inverse).to(work).contiguous());
  const auto V = engine.product(basis, rotation.to(work).contiguous());
  return with_orthonormal(engine, U, S, V, seed);
}

namespace {

// The `count` leading triplets of the space.
Ritz leading_ritz(const Engine& engine, Space& space, int64_t r, int64_t count, double tolerance) {
  if (engine.options.dtype() == at::kDouble) {
    // The form has squares, which would lose values below 1e-8 of the largest.
    const auto [U, S, Qh] = at::linalg_svd(space.image(), /*full_matrices=*/false);
    const auto values = S.narrow(-1, 0, count), left = U.narrow(-1, 0, count);
    const auto turned = Qh.narrow(-2, 0, count).mT().contiguous();
    return {
        values, engine.product(space.basis(), turned), (left * values.unsqueeze(-2)).contiguous(),
        left};
  }
  while (true) {
    const auto chosen = engine.leading_vectors(space.raised_form(), count);
    const auto basis = engine.product(space.operand(), chosen);
    auto ritz = ritz_on(engine, basis, engine.product(space.image(), chosen));
    const auto last = ritz.values.select(-1, r - 1), first = ritz.values.select(-1, 0);
    const auto part = (last / first.clamp_min(1e-300)).clamp_min(kLeastValue).min().item<double>();
    if (!space.shows_all(ritz.values.narrow(-1, 0, r))) {
      space.widen();
      continue;
    }
    // If the rounding error of float32 is a large part of the tolerance, the last step is in
    // float64.
    if (rounding_of(engine, at::kFloat) > 0.25 * tolerance * part) {
      ritz = ritz_on(engine, basis, engine.wide_times(basis));
    }
    return ritz;
  }
}

}  // namespace

Triplets leading_triplets(
    Engine& engine, int64_t r, int64_t subspace, uint64_t seed, double tolerance) {
  const bool bounded = tolerance > 0;
  auto plan = default_plan(r);
  if (subspace > 0) {
    plan.block = std::clamp<int64_t>(subspace / 4, 1, plan.block);
  }
  const int64_t limit = subspace > 0 ? subspace : bounded ? engine.m : plan.subspace;
  if (bounded && tolerance < kFinest) {
    engine.round_no_longer();
  }
  const auto sketch = engine.gaussian(engine.n, std::min(plan.block, engine.m), seed)
                          .expand({engine.count, -1, -1});
  auto block = engine.transposed_times(sketch);
  at::Tensor undo;
  auto sizes = largest_of(block);
  if (engine.host_sees_values() && engine.rounds_operand() && sizes.max().item<double>() == 0) {
    // A processor's bfloat16 products treat subnormal numbers as zero.
    sizes = largest_of(engine.exact_transposed_times(sketch));
  }
  const auto* size = sizes.const_data_ptr<double>();
  if (!std::all_of(size, size + engine.count, in_range)) {
    undo = engine.rescale();
    block = engine.transposed_times(sketch);
  }
  const auto finish = [&](Triplets found) {
    if (undo.defined()) {
      found.S = found.S * undo.unsqueeze(-1);
    }
    if (found.error.defined() && engine.options.dtype() != at::kDouble) {
      // S is rounded to float32, whose smallest number is 2^-149.
      const auto least = found.S.select(-1, -1).maximum(kLeastValue * found.S.select(-1, 0));
      const auto rounding = engine.epsilon() + 0x1p-150 / least;
      found.error = found.error + at::where(least > 0, rounding, 0);
    }
    return found;
  };

  // A space of more than two thirds of all dimensions costs more than a whole decomposition.
  const int64_t room = std::min(limit, 2 * engine.m / 3);
  if (room < r || (room < limit && !bounded)) {
    return finish(dense(engine, r, seed, tolerance));
  }
  // On a GPU the steepness is computed only where it is needed, because the host has to wait for
  // it, and sums are always in float64. So the batch of a float32 weight affects its values only by
  // rounding (the last bits may change, because batched cuBLAS and cuSOLVER use other algorithms).
  // The steepness of a batch is that of its steepest weight.
  const bool host = engine.host_sees_values();
  block = first_columns(orthonormalized(engine, block), room);
  const auto start = block;
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
  // An error in the basis rotates the selected space by as much; the part of the largest value that
  // this loses has to remain below the other values.
  constexpr double kTurned = 3e-3;
  Orthogonality state{std::min(1e-4, kTurned / steep)};
  const auto grow = [&] {
    block = engine.transposed_times(image);
    block = orthonormalized(engine, block, space.basis(), state, space.inside());
    block = first_columns(block, room - space.size());
    image = space.add(block);
    if (host) {
      state.tolerated = std::min(state.tolerated, kTurned / space.steepness_of_last());
    }
  };

  if (bounded) {
    // The goal leaves room for the rounding of the results.
    const double goal = std::max(tolerance - engine.epsilon(), 0.5 * engine.epsilon());
    Settling settling(r, std::max(goal, 8 * engine.epsilon()));
    int64_t next_trial = r;
    uint64_t probe_seed = seed;
    while (true) {
      const bool settled = settling.settled(space.form()), full = space.size() >= room;
      if (full && room < limit) {
        return finish(dense(engine, r, seed, tolerance));
      }
      if (full || (settled && space.size() >= next_trial)) {
        const int64_t count = std::min(space.size(), r + std::max<int64_t>(kBesides, r / 2));
        const auto ritz = leading_ritz(engine, space, r, count, goal);
        Certificate certificate(engine, ritz, r, rounding_of(engine, ritz.images.scalar_type()));
        const int64_t steps = std::max<int64_t>(8, space.size() / kProbeWidth);
        probe_seed += 0x9e3779b97f4a7c15;  // another stream of random numbers
        const bool attainable = certificate.attainable(goal);
        if (full) {
          certificate.measure(steps, probe_seed);
        }
        if (full || (attainable && certificate.proves(steps, probe_seed))) {
          auto found = triplets_of(engine, ritz, r, seed);
          found.error = certificate.error();
          return finish(std::move(found));
        }
        next_trial = space.size() + (attainable ? space.size() / 2 : space.size() / 8);
      }
      grow();
      if (engine.rounds_operand() && space.steepness_of_last() > kSteepest) {
        engine.round_no_longer();
        space = Space(engine, room, /*wide_form=*/true);
        block = start;
        image = space.add(block);
      }
    }
  }

  while (space.size() < room) {
    grow();
  }
  if (engine.options.dtype() == at::kDouble) {
    return finish(triplets_of(engine, leading_ritz(engine, space, r, r, 0.0), r, seed));
  }
  while (true) {
    const auto chosen = engine.leading_vectors(space.raised_form(), r);
    auto found = rayleigh_ritz(
        engine, engine.product(space.operand(), chosen), engine.product(space.image(), chosen),
        seed);
    if (host && !space.shows_all(found.S)) {
      space.widen();
      continue;
    }
    return finish(std::move(found));
  }
}

}  // namespace lora
