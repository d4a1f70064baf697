// The operations of the SVD drivers: products with the weights, and the linear algebra of thin
// matrices, on one kind of device.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

namespace lora {

// A batch of `count` weights of one shape, viewed as tall matrices [n, m] with n >= m (transposed
// if necessary). Tensors are [count, rows, columns] in the working dtype, float32 (float64 for
// float64 weights); "wide" means float64.
class Engine {
 public:
  Engine(int64_t count, int64_t rows, int64_t cols, at::TensorOptions options)
      : count(count),
        n(std::max(rows, cols)),
        m(std::min(rows, cols)),
        flipped(rows < cols),
        options(options) {}
  virtual ~Engine() = default;

  const int64_t count, n, m;
  const bool flipped;
  const at::TensorOptions options;  // of the working dtype

  at::TensorOptions wide() const { return options.dtype(at::kDouble); }
  double epsilon() const { return options.dtype() == at::kDouble ? 0x1p-53 : 0x1p-24; }

  // Whether times() and transposed_times() round their operand to 16 bits (they are exact for
  // 16-bit entries), and a call that turns this off.
  virtual bool rounds_operand() const = 0;
  virtual void round_no_longer() = 0;
  virtual at::Tensor times(const at::Tensor& v) const = 0;             // W v    [n, b]
  virtual at::Tensor transposed_times(const at::Tensor& y) const = 0;  // W^T y  [m, b]
  virtual at::Tensor exact_times(const at::Tensor& v) const = 0;       // W v without that rounding
  virtual at::Tensor exact_transposed_times(const at::Tensor& y) const = 0;
  virtual at::Tensor wide_times(const at::Tensor& v) const = 0;  // W v, wide; v too may be wide
  virtual at::Tensor wide_transposed_times(const at::Tensor& y) const = 0;  // W^T y, the same
  virtual at::Tensor weight_gram() const = 0;                               // W^T W, wide [m, m]
  virtual at::Tensor wide_weight() const = 0;                               // W, wide [n, m]

  // Multiplies the weights by 2^-exponent, so that the largest entry of each is in [1/2, 1): for
  // weights whose squares exceed float32's range. Returns the factors that undo it, wide [count].
  virtual at::Tensor rescale() = 0;

  virtual at::Tensor product(const at::Tensor& a, const at::Tensor& b) const = 0;  // a b
  // The exact product of bfloat16 a and b in the working dtype. In product(), a may be bfloat16
  // too.
  virtual at::Tensor rounded_product(const at::Tensor& a, const at::Tensor& b) const = 0;
  virtual void subtract_product_(at::Tensor& c, const at::Tensor& a, const at::Tensor& b) const = 0;
  virtual at::Tensor gram(const at::Tensor& a, const at::Tensor& b) const = 0;  // a^T b, wide
  virtual at::Tensor wide_product(const at::Tensor& a, const at::Tensor& b) const = 0;  // a b, wide

  virtual at::Tensor gaussian(int64_t rows, int64_t cols, uint64_t seed) const = 0;  // [rows, cols]
  // For wide Gram matrices [b, b], b <= kMaxBlock: upper-triangular X with X^T G X = 1. Columns
  // whose pivot is at most `tolerance` are dropped (zero).
  virtual at::Tensor cholesky_inverse(const at::Tensor& gram, double tolerance) const = 0;
  // For wide symmetric matrices: values [l], descending, and vectors [l, l].
  virtual std::tuple<at::Tensor, at::Tensor> eigh(const at::Tensor& matrices) const = 0;
  // The r leading eigenvectors [l, r] in the working dtype. They need not be exact to the last bit,
  // because they only select a space in which the values are computed again.
  virtual at::Tensor leading_vectors(const at::Tensor& matrices, int64_t r) const = 0;

  // Prepares solve_normal for one weight: an LU factorization of a square weight, or a Cholesky
  // factorization of W^T W - shift of a tall one; false if that is not positive definite.
  virtual bool factorize(double shift) = 0;
  // W^-1 x or W^-T x, for square weights
  virtual at::Tensor solve(const at::Tensor& x, bool transposed) const = 0;
  // (W^T W - shift)^-1 x; the shift is zero for a square weight
  virtual at::Tensor solve_normal(const at::Tensor& x) const = 0;

  // Whether the host may read a value: not on a GPU, where it would wait for the device.
  virtual bool host_sees_values() const = 0;
};

constexpr int64_t kMaxBlock = 128;

// From this number of entries on, a bfloat16 weight is multiplied unconverted by rounded operands.
// That takes a third to a half of the time and gives the same values, but the vectors are accurate
// only to 1e-3.
constexpr int64_t kRoundsFrom = 1 << 19;

// Weights outside this range are rescaled: their squares, or fourth powers in W^T W V, exceed
// float32's range.
inline bool in_range(double size) {
  return size == 0.0 || (size > 0x1p-40 && size < 0x1p40);
}

}  // namespace lora
