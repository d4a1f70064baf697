// Orthonormal bases by Cholesky factors of float64 Gram matrices: products instead of Householder
// reflections, and safe if columns are linearly dependent.
#pragma once

#include <ATen/core/Tensor.h>

#include "engine.h"

namespace lora {

// The deviation of a growing basis from orthonormal, and its limit. One pass multiplies the
// existing error by the factor by which a column became shorter.
struct Orthogonality {
  double tolerated = 0.0;  // a second pass runs if the first would leave more
  double error = 0.0;
};

// An orthonormal basis of the part of `block` [count, m, b] outside the span of `basis`
// [count, m, k], which is orthonormal, except for zero columns; k may be 0. A column that adds
// nothing becomes zero or, in float64, another direction outside that span. `inside` is basis^T
// block, if it is known to within the rounding error of block.
at::Tensor orthonormalized(
    const Engine& engine, at::Tensor block, const at::Tensor& basis, Orthogonality& state,
    at::Tensor inside = {});

// An orthonormal basis of the columns alone, to within rounding.
at::Tensor orthonormalized(const Engine& engine, at::Tensor block);

// Makes all columns of `q` [count, p, r] orthonormal. They already are, except for rounding, zero
// columns, and the last columns of a rank-deficient weight: noise is orthogonalized, zeros are
// replaced.
at::Tensor completed(const Engine& engine, at::Tensor q, uint64_t seed);

}  // namespace lora
