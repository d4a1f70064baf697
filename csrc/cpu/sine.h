// Sines of rational multiples of pi, from exact integer arguments.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <new>
#include <vector>

namespace lora {

// sin(pi * numerator / denominator), numerator >= 0, denominator > 0. The argument is reduced to
// [0, pi/4] in integers, so the result is within 2 ulp for any numerator, and has the same bits as
// the Python reference (the polynomial is evaluated without fused multiply-adds).
double sin_pi(int64_t numerator, int64_t denominator);

// Aligned to cache lines, because the vector loops read 64 bytes at a time.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  LineAllocator() = default;
  template <typename U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
};
using AlignedDoubles = std::vector<double, LineAllocator<double>>;

// One axis of the Christoffel-Darboux form of sum_k sin(k a) sin(k b): for the entries i in
// [offset, offset + length) of an axis of `size`, at a = (i+1) pi / (size+1).
struct AxisFactors {
  AlignedDoubles low;     // sin(rank * a)
  AlignedDoubles high;    // sin((rank + 1) * a)
  AlignedDoubles cosine;  // cos(a)
};

// The tables of one call; layers of equal sizes share them.
class SineTables {
 public:
  // sin(pi * p / n) for p in [0, 2n).
  const std::vector<double>& sines(int64_t n);
  const AxisFactors& axis(int64_t size, int64_t offset, int64_t length, int64_t rank);

 private:
  std::map<int64_t, std::vector<double>> sines_;
  std::map<std::array<int64_t, 4>, AxisFactors> axes_;
};

// sum_{k=1..rank} sin(k a_row) sin(k b_col) by Dirichlet kernels. Their removable singularity at a
// = b is handled exactly, because both arguments are integers over one denominator.
double sine_product_sum(int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t rank);

}  // namespace lora
