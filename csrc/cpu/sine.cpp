#include "sine.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <cstdlib>

// Every multiplication and addition is rounded separately, so that all devices give the same bits.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace lora {
namespace {

constexpr double kPi = 3.141592653589793;

// Minimax polynomials of sine and cosine on [0, pi/4] (the fdlibm coefficients, error < 2^-57).
double sine_polynomial(double x) {
  const double z = x * x;
  double r = 1.58969099521155010221e-10;
  r = -2.50507602534068634195e-08 + z * r;
  r = 2.75573137070700676789e-06 + z * r;
  r = -1.98412698298579493134e-04 + z * r;
  r = 8.33333333332248946124e-03 + z * r;
  r = -1.66666666666666324348e-01 + z * r;
  return x + (z * x) * r;
}

double cosine_polynomial(double x) {
  const double z = x * x;
  double r = -1.13596475577881948265e-11;
  r = 2.08757232129817482790e-09 + z * r;
  r = -2.75573143513906633035e-07 + z * r;
  r = 2.48015872894767294178e-05 + z * r;
  r = -1.38888888888741095749e-03 + z * r;
  r = 4.16666666666666019037e-02 + z * r;
  const double half = 0.5 * z;
  const double w = 1.0 - half;
  return w + (((1.0 - w) - half) + (z * z) * r);
}

constexpr int64_t kTableGrain = 4096;

// sin(q * v) / sin(v) for v = pi * numerator / denominator, q odd.
double dirichlet(int64_t q, int64_t numerator, int64_t denominator) {
  if (numerator == 0) {
    return static_cast<double>(q);
  }
  int64_t product;
  if (__builtin_mul_overflow(q, numerator, &product)) {  // only above 2^40 elements at rank 2^21
    product = static_cast<int64_t>(static_cast<__int128>(q) * numerator % (2 * denominator));
  }
  return sin_pi(product, denominator) / sin_pi(numerator, denominator);
}

}  // namespace

double sin_pi(int64_t numerator, int64_t denominator) {
  int64_t p = numerator % (2 * denominator);
  double sign = 1.0;
  if (p > denominator) {
    p -= denominator;
    sign = -1.0;
  }
  if (2 * p > denominator) {
    p = denominator - p;
  }
  const auto span = static_cast<double>(2 * denominator);
  if (4 * p > denominator) {
    return sign * cosine_polynomial(kPi * (static_cast<double>(denominator - 2 * p) / span));
  }
  return sign * sine_polynomial(kPi * (static_cast<double>(2 * p) / span));
}

const std::vector<double>& SineTables::sines(int64_t n) {
  auto& table = sines_[n];
  if (!table.empty()) {
    return table;
  }
  table.resize(2 * n);
  at::parallel_for(0, n, kTableGrain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      table[p] = sin_pi(p, n);
      table[p + n] = p == 0 ? 0.0 : -table[p];
    }
  });
  return table;
}

const AxisFactors& SineTables::axis(int64_t size, int64_t offset, int64_t length, int64_t rank) {
  auto& axis = axes_[{size, offset, length, rank}];
  if (!axis.low.empty()) {
    return axis;
  }
  const int64_t n = size + 1;
  axis.low.resize(length);
  axis.high.resize(length);
  axis.cosine.resize(length);
  at::parallel_for(0, length, kTableGrain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = offset + k + 1;
      axis.low[k] = sin_pi(rank * i, n);
      axis.high[k] = sin_pi((rank + 1) * i, n);
      axis.cosine[k] = sin_pi(n + 2 * i, 2 * n);
    }
  });
  return axis;
}

double sine_product_sum(int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t rank) {
  const int64_t a = (row + 1) * (cols + 1);
  const int64_t b = (col + 1) * (rows + 1);
  const int64_t denominator = 2 * (rows + 1) * (cols + 1);
  const int64_t q = 2 * rank + 1;
  return 0.25 * (dirichlet(q, std::abs(a - b), denominator) - dirichlet(q, a + b, denominator));
}

}  // namespace lora
