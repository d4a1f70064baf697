#include "probe.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace lora {
namespace {

// P(chi^2 with kProbeWidth = 16 degrees of freedom < 0.78) = 0.94e-8.
constexpr double kLeastSquare = 0.78;
static_assert(kProbeWidth == 16);

// x^T e_j g, the rounding error of a step along one fixed direction, in units of the estimate in
// slip(): six of its standard deviations are 1.5.
constexpr double kStepRounding = 8.0;

std::vector<double> to_vector(const at::Tensor& values) {
  const auto host = values.to(at::kDouble).cpu().contiguous();
  const auto* data = host.const_data_ptr<double>();
  return {data, data + host.numel()};
}

at::Tensor frobenius(const at::Tensor& block) {
  return at::linalg_vector_norm(block, 2, {-2, -1}, /*keepdim=*/true, at::kDouble);
}

}  // namespace

Probe::Probe(const Engine& engine, const at::Tensor& space, const at::Tensor& values, uint64_t seed)
    : engine_(engine),
      space_(space),
      largest_(to_vector(values.select(-1, 0))),
      squares_(to_vector(values.square().sum(-1))) {
  auto block =
      engine.gaussian(engine.m, kProbeWidth, seed).unsqueeze(0).repeat({engine.count, 1, 1});
  project(block);
  const auto length = frobenius(block).clamp_min(std::numeric_limits<float>::min());
  length_ = to_vector(length);
  blocks_.push_back(block / length.to(block.scalar_type()));
}

void Probe::project(at::Tensor& block) const {
  for (int pass = 0; pass < 2; ++pass) {
    engine_.subtract_product_(block, space_, engine_.product(space_.mT(), block));
  }
}

void Probe::step() {
  const auto& last = blocks_.back();
  const auto image = engine_.exact_times(last);
  auto next = engine_.exact_transposed_times(image);
  project(next);
  const auto work = next.scalar_type();
  const auto alpha = frobenius(image).square();
  next.sub_(last * alpha.to(work));
  auto least = at::empty({engine_.count, 1, 1}, at::kDouble);
  for (int64_t k = 0; k < engine_.count; ++k) {
    least[k].fill_(std::pow(engine_.epsilon() * largest_[k], 2));
    if (!beta_.empty()) {
      next[k].sub_(blocks_[blocks_.size() - 2][k], beta_.back()[k]);
    }
  }
  // If only rounding errors are left, they are not scaled up to a block of length 1.
  const auto floor = least.to(alpha.device()) + engine_.epsilon() * alpha;
  const auto beta = at::maximum(frobenius(next), floor).clamp_min(1e-300);
  next.div_(beta.to(work));
  alpha_.push_back(to_vector(alpha));
  beta_.push_back(to_vector(beta));
  blocks_.push_back(next);
}

// The error of a sum of m products is eps sqrt(m / 2) of its partial sums, which are random walks
// as long as |W v| or, if v is orthogonal to W's largest vectors, |W|_F / sqrt(m). Along one of 16
// n directions it is smaller by sqrt(16 n). The second pass has the same error as the first.
double Probe::slip(int64_t weight, double ceiling) const {
  const double beside = alpha_[0][weight] * static_cast<double>(engine_.m - space_.size(-1));
  const double random = std::sqrt((squares_[weight] + beside) / static_cast<double>(engine_.m));
  const double ratio = std::sqrt(static_cast<double>(engine_.n) / static_cast<double>(engine_.m));
  const double size = std::sqrt(ceiling);
  return kStepRounding * engine_.epsilon() * ratio * size * (size + random);
}

Probe::Verdict Probe::verdict(int64_t weight, double ceiling) const {
  const double slip = this->slip(weight, ceiling);
  const size_t count = alpha_.size();
  std::vector<double> p{1.0};
  double squares = 1.0, slips = 0.0, lost = 0.0;
  for (size_t j = 0; j < count; ++j) {
    // beta_j p_{j+1}
    const double next =
        (ceiling - alpha_[j][weight]) * p[j] - (j > 0 ? beta_[j - 1][weight] * p[j - 1] : 0.0);
    if (!(next > 0)) {
      return {false, true, std::numeric_limits<double>::infinity()};
    }
    slips += slip * p[j];
    lost += slips / (next * p[j]);
    p.push_back(std::min(next / beta_[j][weight], 1e100));
    squares += p.back() * p.back();
    if (p.back() >= 1e100) {
      break;
    }
  }
  auto sum = at::zeros_like(blocks_[0][weight]);
  const double size = std::sqrt(squares);
  for (size_t j = 0; j < p.size(); ++j) {
    sum.add_(blocks_[j][weight], p[j] / size);
  }
  const auto wide = sum.to(at::kDouble).cpu();
  const double norm =
      std::sqrt(std::max(0.0, at::linalg_eigvalsh(wide.mT().mm(wide)).max().item<double>()));
  const double start = std::sqrt(kLeastSquare) / length_[weight] - lost;
  if (!(start > 0)) {
    return {false, false, std::numeric_limits<double>::infinity()};
  }
  const double lacking = std::log(std::max(norm, 1e-30) / (size * start));
  return {lacking < 0, false, lacking};
}

double Probe::ceiling(int64_t weight, double known) const {
  double low = alpha_[0][weight], high = known;
  if (std::isinf(high)) {
    double step = 1e-4 * low + std::pow(engine_.epsilon() * largest_[weight], 2) + 1e-300;
    for (high = low + step; !verdict(weight, high).below; high += step) {
      low = high;
      step *= 2;
    }
  }
  constexpr int kHalvings = 8;
  for (int k = 0; k < kHalvings && low < high; ++k) {
    const double middle = 0.5 * (low + high);
    (verdict(weight, middle).below ? high : low) = middle;
  }
  return high;
}

}  // namespace lora
