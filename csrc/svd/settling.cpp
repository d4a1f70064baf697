#include "settling.h"

#include <ATen/ATen.h>

#include <limits>

namespace lora {
namespace {

constexpr double kSlowest = 0.9;  // the largest ratio, used if none is known or there is no decay

}  // namespace

// The changes decrease about geometrically, so the remaining change is the last one times q / (1 -
// q), where q is the ratio of the last two.
bool Settling::settled(const at::Tensor& form) {
  if (form.size(-1) < r_) {
    return false;
  }
  const auto squares = at::linalg_eigvalsh(form).flip(-1).narrow(-1, 0, r_);
  const auto values = squares.clamp_min(0).sqrt();
  bool settled = false;
  if (last_.defined()) {
    const auto floor = kLeastValue * values.narrow(-1, 0, 1) + std::numeric_limits<double>::min();
    const auto change = ((values - last_).abs() / values.maximum(floor)).amax(-1);
    const auto ratio = change_.defined() ? (change / change_.clamp_min(1e-300)).clamp(0, kSlowest)
                                         : at::full_like(change, kSlowest);
    const auto left = change * (ratio / (1 - ratio)).clamp_min(0.5);
    settled = (left <= tolerance_).all().item<bool>();
    change_ = change;
  }
  last_ = values;
  return settled;
}

}  // namespace lora
