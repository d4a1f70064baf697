// Products op(A) B on this package's own strips: for the passes over a weight in the SVD engine,
// where a library's GEMM would want W widened first and runs thin products at half the rate
// (4096^2 by 16 columns, float32: 7.0 and 9.8 ms for W v and W^T v, here 4.8), and where the bits
// must not depend on the number of threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora {

// What is multiplied and summed. kPairs: bfloat16 times bfloat16 into float32, see can_pair.
enum class Arithmetic { kFloat, kDouble, kPairs };

// Whether `a` can be multiplied as bfloat16: its dtype, one unit stride, and the processor.
bool can_pair(const at::Tensor& a);

struct GemmOptions {
  bool transpose = false;   // of A
  double factor = 1.0;      // of A's entries as they are read (not with kPairs)
  double alpha = 1.0;       // of the product
  bool accumulate = false;  // out += alpha op(A) B
  bool lower = false;       // only what lies on or below out's diagonal is wanted
};

// out [p, q] <- alpha op(A) B on the CPU. A [p, k] (or [k, p]) has any floating dtype and strides
// and is widened by tiles; B [k, q] has unit column stride and dtype float32, or float64 with
// kDouble; kPairs rounds it to bfloat16. out is float32, or float64 with kDouble, of unit column
// stride.
void gemm(
    Arithmetic arithmetic, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out,
    const GemmOptions& options = {});

}  // namespace lora
