// An upper bound on what a space has missed: on the largest eigenvalue of W^T W outside the space.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine.h"

namespace lora {

// C = P W^T W P, where P projects onto the complement of `space`. A Gaussian block Omega,
// independent of the space, goes through the Lanczos recurrence of C, with the same coefficients
// for all its columns:
//     C V_j = beta_j V_{j+1} + alpha_j V_j + beta_{j-1} V_{j-1} + e_j,   V_0 = P Omega / |P Omega|.
// For a unit eigenvector x of C with eigenvalue lambda, let g = Omega^T x / |Omega^T x|. The
// numbers s_j = <V_j, x g^T> follow the same recurrence, with s_0 = |Omega^T x| / |P Omega|. With
// its polynomials p_0 = 1, p_1, ... and any ceiling above their zeros, an eigenvalue at or above
// the ceiling would have s_j >= p_j(ceiling) (s_0 - rounding), hence
//     sum_j p_j(ceiling)^2 (s_0 - rounding) <= |sum_j p_j(ceiling) V_j|_2,
// where only |Omega^T x| is unknown: its square is chi-squared distributed, and less than
// kLeastSquare with a probability of 1e-8. The V_j need not be orthogonal, and the recurrence need
// not be run to its end. This is the bound of Kuczynski and Wozniakowski (1992), with a polynomial
// that depends on the matrix instead of Chebyshev's, and with a block instead of one vector.
class Probe {
 public:
  // `space` [count, m, k]: orthonormal. `values`: the singular values on it, wide [count, k].
  Probe(const Engine& engine, const at::Tensor& space, const at::Tensor& values, uint64_t seed);

  int64_t steps() const { return static_cast<int64_t>(blocks_.size()) - 1; }
  void step();

  struct Verdict {
    bool below;      // C's eigenvalues are all below the ceiling
    bool above;      // a zero of the recurrence is above the ceiling, so C has an eigenvalue there
    double lacking;  // how far `below` is from holding, as a logarithm; at most 0 if it holds
  };
  Verdict verdict(int64_t weight, double ceiling) const;

  // After a step: about the smallest ceiling for which `below` holds. `known` is such a ceiling, or
  // infinity.
  double ceiling(int64_t weight, double known) const;

 private:
  void project(at::Tensor& block) const;
  double slip(int64_t weight, double ceiling) const;

  const Engine& engine_;
  at::Tensor space_;
  std::vector<double> largest_, squares_;  // for the values of each weight
  std::vector<at::Tensor> blocks_;
  std::vector<double> length_;                     // |P Omega| for each weight
  std::vector<std::vector<double>> alpha_, beta_;  // [step][weight]
};

constexpr int64_t kProbeWidth = 16;

}  // namespace lora
