#include "certificate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace lora {
namespace {

at::Tensor coupling_of(const Engine& engine, const Ritz& ritz) {
  if (ritz.images.scalar_type() == engine.options.dtype().toScalarType()) {
    auto out = engine.exact_transposed_times(ritz.images);
    for (int pass = 0; pass < 2; ++pass) {
      engine.subtract_product_(out, ritz.vectors, engine.product(ritz.vectors.mT(), out));
    }
    return engine.gram(out, out);
  }
  auto out = engine.wide_transposed_times(ritz.images);
  for (int pass = 0; pass < 2; ++pass) {
    out = out - engine.wide_product(ritz.vectors, engine.gram(ritz.vectors, out));
  }
  return engine.gram(out, out);
}

double square(double x) {
  return x * x;
}

}  // namespace

Certificate::Certificate(const Engine& engine, const Ritz& ritz, int64_t r, double fine)
    : engine_(engine), ritz_(ritz), r_(r), k_(r) {
  const auto values = ritz.values.cpu().contiguous();
  const auto coupling = coupling_of(engine, ritz).cpu();
  const int64_t size = values.size(-1);
  // B = B' + E: B^T B <= 1.1 B'^T B' + 11 E^T E. The norm of a column of E is eps sqrt(m / 2) times
  // that of the partial sums, which is at most the largest value times the column's own.
  const bool wide = ritz.images.scalar_type() == at::kDouble;
  const double eps = (wide ? 0x1p-53 : 0x1p-24) * std::sqrt(static_cast<double>(engine.m));
  for (int64_t w = 0; w < engine.count; ++w) {
    const auto* theta = values.const_data_ptr<double>() + w * size;
    Values of{{theta, theta + size}, coupling[w] * 1.1, fine * theta[0]};
    of.coupling.diagonal().add_((values[w] * (eps * theta[0])).square(), 11.0);
    of_.push_back(std::move(of));
  }
}

// The largest c for which all r values are known to within the tolerance; negative if there is
// none.
double Certificate::needed(const Values& of, int64_t k, double tolerance) const {
  auto scale = at::empty({k}, at::kDouble);
  auto* inverse = scale.mutable_data_ptr<double>();
  double top = 0.0;
  for (int64_t j = 0; j < k; ++j) {
    if (j < r_) {
      top = of.theta[j] + tolerance * std::max(of.theta[j], of.least()) - of.fine;
    }
    const double room = (top - of.theta[j]) * (top + of.theta[j]);
    if (!(room > 0)) {
      return -1.0;
    }
    inverse[j] = 1 / std::sqrt(room);
  }
  const auto coupling = of.coupling.narrow(0, 0, k).narrow(1, 0, k);
  const auto scaled = coupling * scale.unsqueeze(0) * scale.unsqueeze(1);
  return top * top - at::linalg_eigvalsh(scaled).max().item<double>();
}

bool Certificate::attainable(double tolerance) {
  // Trying more numbers of spare vectors would change little.
  constexpr int64_t kChoices = 5;
  tolerance_ = tolerance;
  const auto size = static_cast<int64_t>(of_[0].theta.size());
  const int64_t stride = std::max<int64_t>(1, (size - r_) / kChoices);
  double best = 1.0 + 0.25 * tolerance;
  bool found = false;
  for (int64_t k = r_; k == r_ || k < size; k += stride) {
    double ratio = std::numeric_limits<double>::infinity();
    for (const auto& of : of_) {
      if (!of.zero()) {
        // Nothing is known about the values below the last one.
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
    of.ceiling = of.zero() ? 0.0 : needed(of, k_, tolerance);
  }
  return found;
}

// The smallest tolerance, to within a tenth, for which `ceiling` is low enough.
double Certificate::error_below(const Values& of, double ceiling) const {
  double high = tolerance_, low = 0.5 * high;
  while (needed(of, k_, high) < ceiling) {
    low = high;
    high *= 2;
  }
  if (low < high && high == tolerance_) {
    constexpr double kNotWorthMore = 1e-3;
    while (low > kNotWorthMore * tolerance_ && needed(of, k_, low) >= ceiling) {
      high = low;
      low *= 0.5;
    }
  }
  for (int halving = 0; halving < 3; ++halving) {
    const double middle = 0.5 * (low + high);
    (needed(of, k_, middle) >= ceiling ? high : low) = middle;
  }
  return high;
}

Probe Certificate::probe(uint64_t seed) const {
  const auto space = ritz_.vectors.narrow(-1, 0, k_).to(engine_.options.dtype()).contiguous();
  return Probe(engine_, space, ritz_.values.narrow(-1, 0, k_), seed);
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
      if (!of_[w].zero()) {
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
    // Stop if the remaining steps will not be enough.
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
    if (!of_[w].zero()) {
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
