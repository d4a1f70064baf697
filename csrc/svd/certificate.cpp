#include "certificate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace lora {
namespace {

// B^T B is at most the diagonal matrix of these (Gershgorin, with the columns' lengths as scales).
at::Tensor diagonal_bound(const at::Tensor& gram) {
  const auto lengths = gram.diagonal(0, -2, -1).clamp_min(0).sqrt();
  const auto inverse = at::where(lengths > 0, 1 / lengths, 0);
  return lengths * (gram.abs() * inverse.unsqueeze(-2)).sum(-1);
}

at::Tensor coupling_of(const Engine& engine, const Ritz& ritz) {
  if (ritz.images.scalar_type() == engine.options.dtype().toScalarType()) {
    auto out = engine.exact_transposed_times(ritz.images);
    for (int pass = 0; pass < 2; ++pass) {
      engine.subtract_product_(out, ritz.vectors, engine.product(ritz.vectors.mT(), out));
    }
    return diagonal_bound(engine.gram(out, out));
  }
  auto out = engine.wide_transposed_times(ritz.images);
  for (int pass = 0; pass < 2; ++pass) {
    out = out - engine.wide_product(ritz.vectors, engine.gram(ritz.vectors, out));
  }
  return diagonal_bound(engine.gram(out, out));
}

double square(double x) {
  return x * x;
}

}  // namespace

Certificate::Certificate(const Engine& engine, const Ritz& ritz, int64_t r, double fine)
    : engine_(engine), ritz_(ritz), r_(r), k_(r) {
  const auto values = ritz.values.cpu().contiguous();
  const auto coupling = coupling_of(engine, ritz).cpu().contiguous();
  const int64_t size = values.size(-1);
  for (int64_t w = 0; w < engine.count; ++w) {
    const auto* theta = values.const_data_ptr<double>() + w * size;
    const auto* squares = coupling.const_data_ptr<double>() + w * size;
    Values of{{theta, theta + size}, {}, fine * theta[0]};
    for (int64_t j = 0; j < size; ++j) {
      of.coupling.push_back(square(std::sqrt(squares[j]) + of.fine * theta[j]));
    }
    of_.push_back(std::move(of));
  }
}

// The largest c with which all r values are known to the tolerance. A pair of value and coupling
// alone, [theta^2 sqrt(d); sqrt(d) c], stays below t where (t - theta^2) (t - c) >= d.
double Certificate::needed(const Values& of, int64_t k, double tolerance) const {
  const double least = of.least();
  double out = std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < k; ++j) {
    const double wanted = of.theta[std::min(j, r_ - 1)];
    const double slack = tolerance * std::max(wanted, least) - of.fine;
    if (!(slack > 0)) {
      return -1.0;
    }
    // Not the difference of the squares, which rounding would spoil.
    const double theta = of.theta[j], top = wanted + slack;
    out = std::min(out, top * top - of.coupling[j] / ((top - theta) * (top + theta)));
  }
  return out;
}

bool Certificate::attainable(double tolerance) {
  const auto size = static_cast<int64_t>(of_[0].theta.size());
  double best = 1.0 + 0.25 * tolerance;
  bool found = false;
  for (int64_t k = r_; k <= size; ++k) {
    double ratio = std::numeric_limits<double>::infinity();
    for (const auto& of : of_) {
      if (of.theta[0] > 0) {
        // Nothing is known of what lies below the last value.
        const double next = square(of.theta[std::min(k, size - 1)]);
        ratio = std::min(ratio, needed(of, k, tolerance) / std::max(next, 1e-300));
      }
    }
    if (ratio > best) {
      best = ratio;
      k_ = k;
      found = true;
    }
  }
  for (auto& of : of_) {
    of.ceiling = needed(of, k_, tolerance);
  }
  return found || std::all_of(of_.begin(), of_.end(), [](const Values& of) { return of.theta[0] == 0; });
}

double Certificate::error_below(const Values& of, double ceiling) const {
  std::vector<double> upper;
  for (int64_t j = 0; j < k_; ++j) {
    const double square_j = square(of.theta[j]), half = 0.5 * (square_j - ceiling);
    // The larger eigenvalue of the pair, less the smaller of numbers that nearly agree.
    const double root = std::hypot(half, std::sqrt(of.coupling[j]));
    upper.push_back(
        half > 0 ? square_j + of.coupling[j] / (root + half) : ceiling + (root + half));
  }
  std::sort(upper.begin(), upper.end(), std::greater<>());
  double out = 0.0;
  for (int64_t i = 0; i < r_; ++i) {
    const double more = std::max(upper[i], ceiling) - square(of.theta[i]);
    const double off = more / (std::sqrt(std::max(upper[i], ceiling)) + of.theta[i]);
    out = std::max(out, (off + of.fine) / std::max(of.theta[i], of.least()));
  }
  return out;
}

Probe Certificate::probe(uint64_t seed) const {
  std::vector<double> largest;
  for (const auto& of : of_) {
    largest.push_back(of.theta[0]);
  }
  const auto space = ritz_.vectors.narrow(-1, 0, k_).to(engine_.options.dtype()).contiguous();
  return Probe(engine_, space, largest, seed);
}

bool Certificate::proves(int64_t steps, uint64_t seed) {
  auto probe = this->probe(seed);
  constexpr int64_t kFirst = 5;
  double lacking = std::numeric_limits<double>::infinity();
  while (probe.steps() < steps) {
    probe.step();
    double before = lacking;
    lacking = -std::numeric_limits<double>::infinity();
    for (size_t w = 0; w < of_.size(); ++w) {
      if (of_[w].theta[0] > 0) {
        const auto found = probe.verdict(static_cast<int64_t>(w), of_[w].ceiling);
        if (found.above) {
          return false;
        }
        lacking = std::max(lacking, found.lacking);
      }
    }
    if (lacking < 0) {
      bound(probe);
      return true;
    }
    // No further where the steps that are left would not do.
    const double rate = before - lacking;
    if (probe.steps() >= kFirst && !(lacking < 1.25 * rate * (steps - probe.steps()))) {
      return false;
    }
  }
  return false;
}

void Certificate::measure(int64_t steps, uint64_t seed) {
  auto probe = this->probe(seed);
  for (auto& of : of_) {
    of.ceiling = std::numeric_limits<double>::infinity();
  }
  while (probe.steps() < steps) {
    probe.step();
  }
  bound(probe);
}

void Certificate::bound(const Probe& probe) {
  for (size_t w = 0; w < of_.size(); ++w) {
    if (of_[w].theta[0] > 0) {
      const auto ceiling = probe.ceiling(static_cast<int64_t>(w), of_[w].ceiling);
      of_[w].error = error_below(of_[w], ceiling);
    }
  }
}

at::Tensor Certificate::error() const {
  auto out = at::empty({static_cast<int64_t>(of_.size())}, at::kDouble);
  for (size_t w = 0; w < of_.size(); ++w) {
    out[static_cast<int64_t>(w)].fill_(of_[w].error);
  }
  return out.to(engine_.options.device());
}

}  // namespace lora
