// An upper bound of what a space has missed: of the largest eigenvalue of W^T W beside the space.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine.h"

namespace lora {

// C = P W^T W P with P the projector off `space`. A Gaussian block Omega, independent of the space,
// is run through the Lanczos recurrence of C, all its columns with the same coefficients,
//     C V_j = beta_j V_{j+1} + alpha_j V_j + beta_{j-1} V_{j-1} + e_j,   V_0 = P Omega / |P Omega|.
// A unit eigenvector x of C with eigenvalue lambda has s_j = <V_j, x g^T>, g = Omega^T x / |Omega^T
// x|, that follow the same recurrence in numbers, s_0 = |Omega^T x| / |P Omega|. So with its
// polynomials p_0 = 1, p_1, ... and any ceiling beyond their zeros, an eigenvalue at the ceiling or
// above it would have s_j >= p_j(ceiling) (s_0 - rounding), hence
//     sum_j p_j(ceiling)^2 (s_0 - rounding) <= |sum_j p_j(ceiling) V_j|_2,
// where only |Omega^T x| is not known: its square is chi-squared, less than kLeastSquare with a
// probability of 1e-8. The V_j need not be orthogonal, nor the recurrence run to its end. It is the
// bound of Kuczynski and Wozniakowski (1992), with the polynomial that the matrix itself asks for
// instead of Chebyshev's, and a block for a column.
class Probe {
 public:
  // `space` [count, m, k]: orthonormal. `values`: the singular values on it, wide [count, k].
  Probe(const Engine& engine, const at::Tensor& space, const at::Tensor& values, uint64_t seed);

  int64_t steps() const { return static_cast<int64_t>(blocks_.size()) - 1; }
  void step();

  struct Verdict {
    bool below;      // C's eigenvalues are all below the ceiling
    bool above;      // the recurrence has a zero above it: C has an eigenvalue there
    double lacking;  // the logarithm of what `below` still lacks; at most 0 if it holds
  };
  Verdict verdict(int64_t weight, double ceiling) const;

  // About the least ceiling for which that is so; `known`: one, or infinity. After a step.
  double ceiling(int64_t weight, double known) const;

 private:
  void project(at::Tensor& block) const;
  double slip(int64_t weight, double ceiling) const;

  const Engine& engine_;
  at::Tensor space_;
  std::vector<double> largest_, squares_;  // of the values, of each weight
  std::vector<at::Tensor> blocks_;
  std::vector<double> length_;                     // |P Omega|, of each weight
  std::vector<std::vector<double>> alpha_, beta_;  // [step][weight]
};

constexpr int64_t kProbeWidth = 16;

}  // namespace lora
