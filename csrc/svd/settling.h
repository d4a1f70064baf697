// Watches the r leading values of a growing space, and guesses what they still lack: a sign that it
// is time to bound it, no bound.
#pragma once

#include <ATen/core/Tensor.h>

#include "certificate.h"

namespace lora {

class Settling {
 public:
  // A tolerance of 0: nothing is watched. The estimate is `caution` times the plain one.
  Settling(int64_t r, double tolerance, double caution = 1.0)
      : r_(r), tolerance_(tolerance), caution_(caution) {}

  bool wanted() const { return tolerance_ > 0; }
  const at::Tensor& error() const { return error_; }  // wide [count]; Inf after one step

  // Whether the r leading values, roots of the eigenvalues of `form` (wide [count, k, k]), are all
  // settled to the tolerance, relative to each.
  bool settled(const at::Tensor& form);

 private:
  int64_t r_;
  double tolerance_, caution_;
  at::Tensor last_, change_, error_;
};

}  // namespace lora
