// The inner loops that are compiled once per instruction set, called through a table of pointers.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>
#include <vector>

namespace lora {

constexpr int kRowGroup = 4;  // rows that share one division, see rows.h

// The rows of one group of the Christoffel-Darboux form; low and high are multiplied by the scale.
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
  uint32_t threshold;        // elements whose random word is below it are dropped
  float keep_scale;          // 1 / (1 - p)
  int64_t first_column = 0;  // the column of the first element of a row, a multiple of 4
};

// One strip of a product with a thin matrix: c[i, :] += sum_k a(i, k) b[k, :], in a's precision.
// `b` is packed as [depth][lines] of 64 bytes each; a(i, k) is one scalar or a pair of bfloat16.
constexpr int kStripRows = 24;  // `rows` is a multiple of it, and each register tile divides it

struct Strip {
  const void* a;
  int64_t a_row, a_depth;  // strides, in scalars or pairs
  int64_t rows;
  const void* b;
  int lines;  // 1 or 2
  void* c;
  int64_t c_row;  // stride, in scalars
  int64_t depth;
};

// The memory from which the next tile is packed, prefetched in two cache lines for each k of a
// strip. The hardware's prefetching stops at the end of a page, and the rows of a weight are pages
// apart: without this, a product with 16 columns took 7.9 ms instead of 4.8 (4096^2, float32, 2
// threads of Zen 4).
struct Prefetch {
  uintptr_t start = 0;                                        // 0: none
  int64_t strip_row = 0, sixteenth = 0, one = 0, second = 0;  // in bytes: per row of the strip,
                                                              // k / 16, k % 16, and between the two
};

// Rows of W + a b, of which only the squares are needed. `a` is packed as [depth][kSquareRows], `b`
// as [panel][depth][square_bytes], including zeros after the last column. W, a and b are all
// float32 or all float64.
constexpr int kSquareRows = 8;

struct SquareTile {
  const void* rows[kSquareRows];  // of W; pointers from `count` on may be any that can be read
  int64_t count;
  const void* a;
  const void* b;
  int64_t depth;
  int64_t columns;  // rows[] can be read up to the end of the panel
  // Memory of W that will be needed soon, prefetched with each panel; 0: none.
  uintptr_t ahead = 0;
  int64_t ahead_row = 0, ahead_panel = 0;  // in bytes
};

// y = y0 * gain + bias in float32 (float64 if dtype is), rounded once. The gain is float32, or
// float64 if dtype is; the bias may be null.
struct DoraRow {
  const void *y0, *gain, *bias;
  void* y;
  c10::ScalarType dtype;
  int64_t count;
};

// dy0 = dy * gain; gain_sums += dy * y0; bias_sums += dy. The sums have the gain's type. Null
// outputs are not computed.
struct DoraGradRow {
  const void *dy, *y0, *gain;
  void *dy0, *gain_sums, *bias_sums;
  c10::ScalarType dtype;
  int64_t count;
};

struct Kernels {
  // rows[g][j] -= (high[g] low_col[j] - low[g] high_col[j]) / (cosine[g] - cosine_col[j]), in fp32
  // and rounded once to the dtype, which is not float64. Undefined at columns where the divisor of
  // any row of the group is zero.
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
  int strip_lines;  // the width of the fastest strip
  void (*strip_f32)(const Strip& strip, const Prefetch& prefetch);
  void (*strip_f64)(const Strip& strip, const Prefetch& prefetch);
  // out[j] = x[j] in float32; x is bfloat16 or float16
  void (*widen_row)(const void* x, c10::ScalarType dtype, float* out, int64_t count);
  int square_bytes;  // the size of a row of a panel
  // sums[i] += sum_j (W + a b)(i, j)^2 and sizes[i] += sum_j W(i, j)^2, for each of `count` rows
  void (*row_squares_f32)(const SquareTile& tile, double* sums, double* sizes);
  void (*row_squares_f64)(const SquareTile& tile, double* sums, double* sizes);
  // sums[j] += sum_i (W + a b)(i, j)^2 and sizes[j] += sum_i W(i, j)^2, for whole panels
  void (*column_squares_f32)(const SquareTile& tile, float* sums, float* sizes);
  void (*column_squares_f64)(const SquareTile& tile, double* sums, double* sizes);
  void (*dora_scale_row)(const DoraRow& row);
  void (*dora_scale_grad_row)(const DoraGradRow& row);
};

// Products of bfloat16 pairs, summed in float32 (AVX512_BF16).
struct PairKernels {
  void (*strip)(const Strip& strip, const Prefetch& prefetch);  // c is float32
  // out[j] = (a[j], b[j]); b may be null, which means zeros
  void (*pair_rows)(const uint16_t* a, const uint16_t* b, uint32_t* out, int64_t count);
  // the same from float32, rounded to nearest even
  void (*round_pairs)(const float* a, const float* b, uint32_t* out, int64_t count);
};

// The kernels of the instruction set in use: the best that this processor has, unless a lower one
// was set.
const Kernels& kernels();

// Null if the set in use has no products of bfloat16.
const PairKernels* pair_kernels();

// Whether torch has vectorized matrix products for this dtype on a processor with the set in use.
bool has_quick_products(c10::ScalarType dtype);

// The set in use, and all sets that this processor has, in ascending order: baseline, avx2, avx512,
// avx512bf16.
const char* cpu_capability();
std::vector<std::string> cpu_capabilities();
// Changes the set for all threads; false if this processor has no set of that name.
bool set_cpu_capability(const std::string& name);

const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const PairKernels& kernels_avx512bf16();

}  // namespace lora
