// Strips of products with a thin matrix, see Strip in kernels.h. Parsed for the target of LORA_ISA,
// see vectors.h.
#pragma once

#include "vectors.h"

namespace lora {
namespace LORA_ISA {
namespace {

// Rows of the register tile for strips of one line of 64 bytes and, if the set has enough
// registers, of two lines: the registers left by the vectors of b and one register for a.
#if defined(LORA_STRIP_ROWS_1)
constexpr int kRowsOf1 = LORA_STRIP_ROWS_1;
#elif defined(__aarch64__)
constexpr int kRowsOf1 = 6;
#else
constexpr int kRowsOf1 = 2;
#endif
#if defined(LORA_STRIP_ROWS_2)
constexpr int kRowsOf2 = LORA_STRIP_ROWS_2;
#else
constexpr int kRowsOf2 = 0;
#endif
static_assert(kStripRows % kRowsOf1 == 0 && (kRowsOf2 == 0 || kStripRows % kRowsOf2 == 0));

struct Line {
  uintptr_t at;
  const Prefetch& rule;

  void touch(int64_t k) const {
    if (at != 0) {
      const uintptr_t line = at + (k >> 4) * rule.sixteenth + (k & 15) * rule.one;
      __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
      __builtin_prefetch(reinterpret_cast<const void*>(line + rule.second), 0, 2);
    }
  }
};

// Arithmetic on vectors of T. The scalars of a are T or, in avx512bf16.cpp, pairs.
template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  using A = T;
  using C = T;
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  static Vector load(const T* p) { return read_vector<Vector>(p); }
  static void add_product(Vector& sum, const T& a, const Vector& b) { sum += a * b; }
};

// kRows rows of c by kLines lines of b, whose rows are `b_step` apart.
template <typename L, int kRows, int kLines>
void multiply_rows(
    const typename L::A* a, const typename L::A* b, int64_t b_step, typename L::C* c,
    const Strip& strip, const Line& line) {
  constexpr int kWidth = L::kWidth, kVectors = kLines * 64 / kVectorBytes;
  const int64_t a_row = strip.a_row, a_depth = strip.a_depth, depth = strip.depth;
  typename L::Vector sums[kRows][kVectors];
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = read_vector<typename L::Vector>(c + i * strip.c_row + v * kWidth);
    }
  }
  for (int64_t k = 0; k < depth; ++k, a += a_depth, b += b_step) {
    line.touch(k);
    decltype(L::load(b)) columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = L::load(b + v * kWidth);
    }
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        L::add_product(sums[i][v], a[i * a_row], columns[v]);
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      write_vector(sums[i][v], c + i * strip.c_row + v * kWidth);
    }
  }
}

// The columns of a strip from line `first` on, kLines lines of them.
template <typename L, int kRows, int kLines>
void multiply_lines(const Strip& strip, int first, const Prefetch& prefetch) {
  constexpr int64_t kLine = 64 / sizeof(typename L::A);
  const auto* a = static_cast<const typename L::A*>(strip.a);
  const auto* b = static_cast<const typename L::A*>(strip.b) + first * kLine;
  auto* c = static_cast<typename L::C*>(strip.c) + first * kLine;
  for (int64_t i = 0; i < strip.rows; i += kRows) {
    const Line line{prefetch.start ? prefetch.start + i * prefetch.strip_row : 0, prefetch};
    multiply_rows<L, kRows, kLines>(
        a + i * strip.a_row, b, strip.lines * kLine, c + i * strip.c_row, strip, line);
  }
}

template <typename L>
void multiply_strip(const Strip& strip, const Prefetch& prefetch) {
  if constexpr (kRowsOf2 > 0) {
    if (strip.lines == 2) {
      return multiply_lines<L, kRowsOf2, 2>(strip, 0, prefetch);
    }
  }
  for (int line = 0; line < strip.lines; ++line) {
    multiply_lines<L, kRowsOf1, 1>(strip, line, line == 0 ? prefetch : Prefetch{});
  }
}

}  // namespace
}  // namespace LORA_ISA
}  // namespace lora
