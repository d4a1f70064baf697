// Estimates how far the r leading values of a growing space are from their limits. The estimate is
// not a bound; it tells when computing one is worthwhile.
#pragma once

#include <ATen/core/Tensor.h>

#include "certificate.h"

namespace lora {

class Settling {
 public:
  Settling(int64_t r, double tolerance) : r_(r), tolerance_(tolerance) {}

  // Whether the r leading values, the roots of the eigenvalues of `form` (wide [count, k, k]), have
  // converged to the tolerance, relative to each.
  bool settled(const at::Tensor& form);

 private:
  int64_t r_;
  double tolerance_;
  at::Tensor last_, change_;
};

}  // namespace lora
