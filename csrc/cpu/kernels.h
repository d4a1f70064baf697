// The inner loops that are compiled once per instruction set, behind one table of pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace lora {

constexpr int kRowGroup = 4;  // rows that share one division, see kernels_impl.h

// Rows of one group of the Christoffel-Darboux form; low and high carry the scale.
struct RowGroup {
  double low[kRowGroup];
  double high[kRowGroup];
  double cosine[kRowGroup];
};

struct SumPair {
  double sum;
  double sum_of_squares;
};

struct Philox {
  uint64_t seed;
  uint32_t threshold;  // an element is dropped when its random word is below this
  float keep_scale;    // 1 / (1 - p)
};

struct Kernels {
  const char* name;
  // rows[g][j] -= (high[g] low_col[j] - low[g] high_col[j]) / (cosine[g] - cosine_col[j]), in fp32
  // and rounded once to the dtype (not float64). Meaningless at a column where, for any row of the
  // group, the divisor is zero.
  void (*subtract_rows)(
      const RowGroup& group, const double* low, const double* high, const double* cosine,
      int64_t columns, void* const (&rows)[kRowGroup], c10::ScalarType dtype);
  SumPair (*sums)(const void* data, c10::ScalarType dtype, int64_t stride, int64_t count);
  // out[j] = table[(index + j * step) mod period]; index, step < period < 2^31
  void (*gather_row)(
      const float* table, uint32_t period, uint32_t index, uint32_t step, float* out,
      int64_t count);
  // out[j] = keep(row, j) ? keep_scale * x[j] : 0
  void (*dropout_row)(
      const void* x, void* out, c10::ScalarType dtype, int64_t row, int64_t count,
      const Philox& philox);
};

// The best set this processor has; ATEN_CPU_CAPABILITY (default, avx2, avx512) lowers it, as it
// does for torch's own kernels.
const Kernels& kernels();

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace lora
