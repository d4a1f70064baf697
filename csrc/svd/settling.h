// Watches the r leading values of a growing space, and guesses what they still lack: a sign that it
// is time to bound it, no bound.
#pragma once

#include <ATen/core/Tensor.h>

#include "certificate.h"

namespace lora {

class Settling {
 public:
  Settling(int64_t r, double tolerance) : r_(r), tolerance_(tolerance) {}

  // Whether the r leading values, roots of the eigenvalues of `form` (wide [count, k, k]), are all
  // settled to the tolerance, relative to each.
  bool settled(const at::Tensor& form);

 private:
  int64_t r_;
  double tolerance_;
  at::Tensor last_, change_;
};

}  // namespace lora
