// Triangular factors of large matrices, and solutions with many right-hand sides, using the
// products of gemm.h: the bits do not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora {

// A triangular matrix [n, n] with the inverses of its diagonal blocks, so that solving consists of
// products only.
class Triangle {
 public:
  static constexpr int64_t kBlock = 128;

  // `matrix` is read on and below its diagonal (lower) or on and above (upper); if `unit`, ones are
  // used instead of the diagonal.
  Triangle(at::Tensor matrix, bool lower, bool unit);

  // T^-1 x or T^-T x, for x [n, b].
  at::Tensor solve(const at::Tensor& x, bool transposed) const;

 private:
  at::Tensor matrix_;
  bool lower_;
  at::Tensor inverses_;  // [blocks, kBlock, kBlock]
};

// W = P^T L U with partial pivoting; W [n, n] is copied. A zero pivot is replaced by the rounding
// error of W's largest entry, so that a singular W is solved like a regular matrix next to it.
class LuFactors {
 public:
  explicit LuFactors(const at::Tensor& weight);

  // W^-1 x or W^-T x
  at::Tensor solve(const at::Tensor& x, bool transposed) const;

 private:
  explicit LuFactors(std::pair<at::Tensor, at::Tensor> factors);

  at::Tensor order_;  // row i of P W is row order_[i] of W
  Triangle lower_, upper_;
};

// Replaces `matrix` [n, n], of which the lower half is read, by its lower Cholesky factor; false if
// it is not positive definite.
bool cholesky_(at::Tensor& matrix);

}  // namespace lora
