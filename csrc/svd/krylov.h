// Leading singular triplets by block Krylov subspaces (Musco and Musco, arXiv 1504.05477).
#pragma once

#include <ATen/core/Tensor.h>

#include "engine.h"

namespace lora {

struct Triplets {
  at::Tensor U, S, V;  // [count, n, r], wide [count, r], [count, m, r]: of the tall weights
  at::Tensor error;    // wide [count], see leading_triplets; undefined without a tolerance
};

// The r leading triplets, descending. `subspace`: dimension of the Krylov space, 0 for the default.
// With tolerance > 0 it grows until the largest relative error of the r values is bounded by it
// (see certificate.h), and `subspace` is the largest dimension allowed (0: none).
Triplets leading_triplets(
    Engine& engine, int64_t r, int64_t subspace, uint64_t seed, double tolerance);

// All m triplets, by the library's SVD in float64.
Triplets exact_triplets(const Engine& engine);

// Triplets on the span of `basis` [count, m, r], nearly orthonormal but for zero columns at the
// end. `image` is W basis. Rayleigh-Ritz with Gram matrices in float64.
Triplets rayleigh_ritz(
    const Engine& engine, const at::Tensor& basis, const at::Tensor& image, uint64_t seed);

}  // namespace lora
