// Products op(A) B with this package's own kernels. The SVD engine uses them for its passes over a
// weight: a library's GEMM needs a float32 copy of W and is slower for thin products (4096^2 by 16
// columns in float32: 7.0 and 9.8 ms for W v and W^T v, here 4.8), and its bits may depend on the
// number of threads.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora {

// The type of the products and sums. kPairs: bfloat16 times bfloat16, summed in float32; see
// can_pair.
enum class Arithmetic { kFloat, kDouble, kPairs };

// Whether `a` can be multiplied as bfloat16, given its dtype, its strides (one has to be 1) and the
// processor.
bool can_pair(const at::Tensor& a);

struct GemmOptions {
  bool transpose = false;   // of A
  double factor = 1.0;      // applied to A's entries as they are read (not with kPairs)
  double alpha = 1.0;       // applied to the product
  bool accumulate = false;  // out += alpha op(A) B
  bool lower = false;       // only out's diagonal and the entries below are needed
};

// out [p, q] = alpha op(A) B on the CPU. A [p, k] (or [k, p]) has any floating dtype and strides
// and is converted tile by tile. B [k, q] has a column stride of 1 and is float32, or float64 with
// kDouble; kPairs rounds it to bfloat16. out has a column stride of 1 and is float32, or float64
// with kDouble.
void gemm(
    Arithmetic arithmetic, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out,
    const GemmOptions& options = {});

}  // namespace lora
