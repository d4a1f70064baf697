// What the leading singular values of a space are off by at most.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine.h"
#include "probe.h"

namespace lora {

// Values below this part of the largest are compared with it instead.
constexpr double kLeastValue = 1e-7;

// Rayleigh and Ritz's triplets on a space, as products: W vectors = images, of length `values`.
struct Ritz {
  at::Tensor values;   // wide [count, k], descending
  at::Tensor vectors;  // [count, m, k] of the working dtype or wide, orthonormal; or zero columns
  at::Tensor images;   // [count, n, k], of the same dtype
  at::Tensor left;     // the images' directions, orthonormal, where an SVD has given them
};

// Ritz values are at most W's singular values, by Cauchy's interlacing. What W's may be more: with
// V the k first vectors (the r wanted, and others that take what lies next out of the way), Theta
// their values, B = (1 - V V^T) W^T W V and c a bound of W^T W beside V,
//     W^T W <= [Theta^2  B^T; B  c] <= [T  0; 0  t]   if  B^T B <= (t - c) (T - Theta^2)
// for any diagonal T with t its least entry, and then T_i bounds the i-th squared value (Weyl). T
// is here (1 + tolerance)^2 times the squared value. B is computed, c comes from a probe: with a
// probability of at least 1 - 1e-8; a space that grows by half after each probe meets few of them.
class Certificate {
 public:
  // `fine`: the rounding of Ritz's values, relative to the largest one.
  Certificate(const Engine& engine, const Ritz& ritz, int64_t r, double fine);

  // Whether the values would be known to the tolerance if nothing was missed but what the space
  // knows of; chooses k.
  bool attainable(double tolerance);
  // Whether they are, by at most that many steps of a probe with this seed.
  bool proves(int64_t steps, uint64_t seed);
  // The bound, by that many steps, whatever it is.
  void measure(int64_t steps, uint64_t seed);

  at::Tensor error() const;  // wide [count]: after proves() or measure()

 private:
  struct Values {
    std::vector<double> theta;
    at::Tensor coupling;   // B^T B, wide [k, k] on the host, with what rounding may have hidden
    double fine;           // the rounding of each value, absolute
    double ceiling = 0.0;  // c that is needed
    double error = 0.0;
    bool zero() const { return theta[0] == 0; }
    double least() const { return kLeastValue * theta[0]; }
  };
  Probe probe(uint64_t seed) const;
  void bound(const Probe& probe);
  double needed(const Values& of, int64_t k, double tolerance) const;
  double error_below(const Values& of, double ceiling) const;

  const Engine& engine_;
  const Ritz ritz_;
  int64_t r_, k_;
  double tolerance_ = 0.0;
  std::vector<Values> of_;
};

}  // namespace lora
