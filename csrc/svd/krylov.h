// Leading singular triplets by block Krylov subspaces (Musco and Musco, arXiv 1504.05477).
#pragma once

#include <ATen/core/Tensor.h>

#include "engine.h"

namespace lora {

struct Triplets {
  at::Tensor U, S, V;  // [count, n, r], wide [count, r], [count, m, r]: for the tall weights
  at::Tensor error;    // wide [count], see leading_triplets; undefined without a tolerance
};

// The r leading triplets, descending. `subspace` is the dimension of the Krylov space, or 0 for the
// default. With tolerance > 0 the space grows until the largest relative error of the r values is
// at most the tolerance (see certificate.h), and `subspace` is the largest dimension allowed (0: no
// limit).
Triplets leading_triplets(
    Engine& engine, int64_t r, int64_t subspace, uint64_t seed, double tolerance);

// All m triplets, from the library's SVD in float64.
Triplets exact_triplets(const Engine& engine);

// Triplets on the span of `basis` [count, m, r], which is nearly orthonormal, except for zero
// columns at the end; `image` is W basis. Rayleigh-Ritz with Gram matrices in float64.
Triplets rayleigh_ritz(
    const Engine& engine, const at::Tensor& basis, const at::Tensor& image, uint64_t seed);

}  // namespace lora
