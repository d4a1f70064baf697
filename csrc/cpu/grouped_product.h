// The operands and the products of one task of lora::grouped_linear.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "grouped.h"
#include "simd/kernels.h"

namespace lora::grouped {

using Optional = std::optional<at::Tensor>;

// Thin products and sums are in float32 (float64 for float64). A product with a 16-bit weight runs
// in 16 bits where torch has vectorized kernels; else the weight is converted tile by tile.
struct Precision {
  c10::ScalarType model, sums;
  bool narrow;  // products with a weight are in 16 bits

  explicit Precision(c10::ScalarType dtype);
};

// The adapter of each expert, rounded to the model's dtype. The factors of a start follow those of
// the adapter, B0 negated, so that the two cancel in one product of rank 2r before y is rounded.
struct Factors {
  const at::Tensor &A, &B;
  const Optional &start_A, &start_B;
  Precision precision;

  int64_t rank() const { return A.size(1); }
  int64_t total_rank() const { return rank() * (start_A ? 2 : 1); }
  at::Tensor down(int64_t expert) const;  // [total_rank, K], in the dtype of sums
  at::Tensor up(int64_t expert) const;    // [N, total_rank]

 private:
  at::Tensor one(const at::Tensor& stack, int64_t expert) const;
};

// The dropout mask of (row of the product, column, seed).
class Mask {
 public:
  Mask(double p, const Optional& seed);
  bool active() const { return active_; }
  // Applies the mask to rows of the product, from row `row` and column `left` on.
  void apply_(const at::Tensor& values, int64_t row, int64_t left) const;

 private:
  bool active_;
  Philox philox_{};
};

// Row i of the operand is matrix[rows[i]], or matrix[i] without `rows`; matrix is contiguous.
struct Operand {
  at::Tensor matrix;
  const int64_t* rows;
  Precision precision;

  // Rows [begin, end), columns [left, right) in the dtype of sums; never a view if `copied`.
  at::Tensor wide(
      int64_t begin, int64_t end, int64_t left, int64_t right, bool copied, Scratch& scratch) const;
  // The same in 16 bits, with zeros after the last row up to a multiple of kRowsTogether.
  at::Tensor narrow(int64_t begin, int64_t end, Scratch& scratch) const;
};

// out [s, columns] (dtype of sums) = rows times M, where M is the part of a weight
// [inner, columns], of any strides. `rows` is Operand::narrow where products are in 16 bits, else
// Operand::wide.
void multiply(
    const Precision& precision, const at::Tensor& out, const at::Tensor& rows, const at::Tensor& M,
    Scratch& scratch);

}  // namespace lora::grouped
