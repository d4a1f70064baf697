#include "includes.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define LORA_F16C
#define LORA_VECTOR_BYTES 64
#define LORA_STRIP_ROWS_2 12
#define LORA_STRIP_ROWS_1 24
#define LORA_ISA avx512bf16
#include "strip.h"

namespace lora {
namespace avx512bf16 {
namespace {

// A scalar of a is a pair of bfloat16; a vector of b has sixteen pairs.
struct PairLanes {
  using Vector = __m512;
  using A = uint32_t;
  using C = float;
  static constexpr int kWidth = 16;
  static __m512bh load(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static void add_product(__m512& sum, const uint32_t& a, const __m512bh& b) {
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), b);
  }
};

void strip(const Strip& strip, const Prefetch& prefetch) {
  multiply_strip<PairLanes>(strip, prefetch);
}

void pair_rows(const uint16_t* a, const uint16_t* b, uint32_t* out, int64_t count) {
  if (b == nullptr) {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = a[j];
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    out[j] = a[j] | static_cast<uint32_t>(b[j]) << 16;
  }
}

inline uint32_t rounded(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

void round_pairs(const float* a, const float* b, uint32_t* out, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = rounded(a[j]) | (b == nullptr ? 0u : rounded(b[j])) << 16;
  }
}

const PairKernels table{strip, pair_rows, round_pairs};

}  // namespace
}  // namespace avx512bf16
}  // namespace lora
#if defined(__clang__)
#pragma clang attribute pop
#endif

const lora::PairKernels& lora::kernels_avx512bf16() {
  return avx512bf16::table;
}
#endif
