// Orthonormal bases by Cholesky factors of float64 Gram matrices: products instead of Householder's
// reflections, and safe where columns depend on each other.
#pragma once

#include <ATen/core/Tensor.h>

#include "engine.h"

namespace lora {

// How far a growing basis is from orthonormal, and may be. One pass leaves the error that is there
// times the factor by which a column became shorter.
struct Orthogonality {
  double tolerated = 0.0;  // a second pass follows where the first would leave more
  double error = 0.0;
};

// An orthonormal basis of what `block` [count, m, b] adds to the span of `basis` [count, m, k]
// (orthonormal, some columns perhaps zero; k may be 0). A column that adds nothing becomes zero;
// in float64, some other direction outside that span.
// `inside`: basis^T block where it is known already, to the rounding of block.
at::Tensor orthonormalized(
    const Engine& engine, at::Tensor block, const at::Tensor& basis, Orthogonality& state,
    at::Tensor inside = {});

// The same of columns alone, to rounding.
at::Tensor orthonormalized(const Engine& engine, at::Tensor block);

// `q` [count, p, r], whose columns are orthonormal but for rounding, zeros, and the last ones of a
// rank-deficient weight, with all columns orthonormal: noise is orthogonalised, zeros are replaced.
at::Tensor completed(const Engine& engine, at::Tensor q, uint64_t seed);

}  // namespace lora
