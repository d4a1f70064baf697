// A bound on the errors of the leading singular values computed from a space.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "engine.h"
#include "probe.h"

namespace lora {

// Errors of values smaller than this fraction of the largest are relative to that fraction instead.
constexpr double kLeastValue = 1e-7;

// Rayleigh-Ritz triplets on a space. The singular values are the lengths of the images: W vectors =
// images.
struct Ritz {
  at::Tensor values;   // wide [count, k], descending
  at::Tensor vectors;  // [count, m, k] of either dtype; orthonormal or zero columns
  at::Tensor images;   // [count, n, k], of the same dtype
  at::Tensor left;     // the directions of the images, orthonormal, if an SVD has computed them
};

// Ritz values are at most W's singular values, by Cauchy's interlacing theorem. How much larger W's
// may be: let V be the first k vectors (the r wanted and some more, which separate them from the
// next values), Theta their values, B = (1 - V V^T) W^T W V, and c a bound on W^T W restricted to
// the complement of V. Then
//     W^T W <= [Theta^2  B^T; B  c] <= [T  0; 0  t]   if  B^T B <= (t - c) (T - Theta^2)
// for any diagonal T whose smallest entry is t, and by Weyl's inequality T_i bounds the i-th
// squared value. Here T is (1 + tolerance)^2 times the squared values. B is computed; c comes from
// a probe and holds with a probability of at least 1 - 1e-8. If the space grows by half after each
// probe, few probes are needed.
class Certificate {
 public:
  // `fine`: the rounding error of the Ritz values, relative to the largest one.
  Certificate(const Engine& engine, const Ritz& ritz, int64_t r, double fine);

  // Whether the values would be known to within the tolerance if the space had missed nothing
  // larger than its smallest values. Chooses k.
  bool attainable(double tolerance);
  // Whether the values are known to within the tolerance, using at most `steps` steps of a probe
  // with this seed.
  bool proves(int64_t steps, uint64_t seed);
  // Computes the bound, whatever its value, with `steps` steps.
  void measure(int64_t steps, uint64_t seed);

  at::Tensor error() const;  // wide [count]: after proves() or measure()

 private:
  struct Values {
    std::vector<double> theta;
    at::Tensor coupling;   // B^T B, wide [k, k] on the host, plus a bound on its rounding error
    double fine;           // the absolute rounding error of each value
    double ceiling = 0.0;  // the c that the tolerance needs
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
