// Triangular factors of large matrices on this package's GEMM, and solutions with many right-hand
// sides: the same bits on any number of threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora {

// A triangular matrix [n, n] with the inverses of its diagonal blocks, so that a solution is
// products only.
class Triangle {
 public:
  static constexpr int64_t kBlock = 128;

  // `matrix` is read on and below its diagonal (lower), or on and above (upper), with ones in the
  // place of its diagonal if `unit`.
  Triangle(at::Tensor matrix, bool lower, bool unit);

  // T^-1 x or T^-T x, for x [n, b].
  at::Tensor solve(const at::Tensor& x, bool transposed) const;

 private:
  at::Tensor matrix_;
  bool lower_;
  at::Tensor inverses_;  // [blocks, kBlock, kBlock]
};

// W = P^T L U by partial pivoting; W [n, n] is copied. A pivot that vanishes is replaced by the
// rounding of W's largest entry: a singular W is solved as one next to it.
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

// The lower Cholesky factor of `matrix` [n, n] (its lower half is read), in its place; false if it
// is not positive definite.
bool cholesky_(at::Tensor& matrix);

}  // namespace lora
