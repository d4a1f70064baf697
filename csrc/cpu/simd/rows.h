// The kernels that go along the rows of a matrix, see Kernels in kernels.h. Parsed for the target
// of LORA_ISA, see vectors.h.
#pragma once

#include "vectors.h"

namespace lora {
namespace LORA_ISA {
namespace {

// One step of a loop has kStep entries, in one vector of floats (or of their bits) and in kParts
// vectors of doubles.
constexpr int kDoubles = kVectorBytes / 8;
constexpr int kStep = kDoubles < 4 ? 4 : 8, kParts = kStep / kDoubles;

typedef double Doubles __attribute__((vector_size(kVectorBytes)));
typedef float PartFloats __attribute__((vector_size(4 * kDoubles)));  // of one vector of doubles
typedef float Floats __attribute__((vector_size(4 * kStep)));
typedef uint32_t Words __attribute__((vector_size(4 * kStep)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kStep)));

template <typename Part>  // PartFloats
inline Floats joined(const Part (&parts)[kParts]) {
#if __has_builtin(__builtin_shufflevector)  // from GCC 12 on; else through memory
  if constexpr (kParts == 2 && kStep == 8) {
    return __builtin_shufflevector(parts[0], parts[1], 0, 1, 2, 3, 4, 5, 6, 7);
  } else if constexpr (kParts == 2) {
    return __builtin_shufflevector(parts[0], parts[1], 0, 1, 2, 3);
  }
#endif
  return read_vector<Floats>(parts);
}

inline float to_float(float x) {
  return x;
}
inline float to_float(c10::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline void from_float(float x, float& out) {
  out = x;
}
inline void from_float(float x, c10::BFloat16& out) {  // round to nearest even, as c10 does
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.x = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

#ifdef LORA_F16C
inline float to_float(c10::Half x) {
  return _cvtsh_ss(x.x);
}
inline void from_float(float x, c10::Half& out) {
  out.x = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
inline float to_float(c10::Half x) {
  return static_cast<float>(x);
}
inline void from_float(float x, c10::Half& out) {
  out = c10::Half(x);
}
#endif

inline Floats load(const float* p) {
  return read_vector<Floats>(p);
}
inline void store(const Floats& x, float* p) {
  write_vector(x, p);
}

inline Floats load(const c10::BFloat16* p) {
  return (Floats)(__builtin_convertvector(read_vector<Shorts>(p), Words) << 16);
}
inline void store(const Floats& x, c10::BFloat16* p) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (x != x) ? (Words{} + 0x7fc0u) : rounded;
  write_vector(__builtin_convertvector(quiet, Shorts), p);
}

inline Floats load(const c10::Half* p) {
#ifdef LORA_F16C
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Floats x;
  for (int lane = 0; lane < kStep; ++lane) {
    x[lane] = to_float(p[lane]);
  }
  return x;
#endif
}
inline void store(const Floats& x, c10::Half* p) {
#ifdef LORA_F16C
  const auto half = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  for (int lane = 0; lane < kStep; ++lane) {
    from_float(x[lane], p[lane]);
  }
#endif
}

// Stores to the same columns of all rows of a group.
template <typename T>
inline void store(const Floats (&x)[kRowGroup], T* const (&rows)[kRowGroup], int64_t j) {
#pragma GCC unroll 4
  for (int r = 0; r < kRowGroup; ++r) {
    store(x[r], rows[r] + j);
  }
}

#if defined(LORA_F16C)
// Two rows share the permutation that orders their halves, and all four share the test for NaN.
inline void store(
    const Floats (&x)[kRowGroup], c10::BFloat16* const (&rows)[kRowGroup], int64_t j) {
  const auto sum = (__m256)((x[0] + x[1]) + (x[2] + x[3]));
  if (_mm256_movemask_ps(_mm256_cmp_ps(sum, sum, _CMP_UNORD_Q)) != 0) {
    for (int r = 0; r < kRowGroup; ++r) {
      store(x[r], rows[r] + j);
    }
    return;
  }
  const auto rounded = [](const Floats& value) __attribute__((always_inline)) {
    const Words bits = (Words)value;
    return (__m256i)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  };
#pragma GCC unroll 2
  for (int r = 0; r < kRowGroup; r += 2) {
    const auto both =
        _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(x[r]), rounded(x[r + 1])), 0xd8);
    write_vector(_mm256_castsi256_si128(both), rows[r] + j);
    write_vector(_mm256_extracti128_si256(both, 1), rows[r + 1] + j);
  }
}
#endif

// A row group's factors in the form used by the loop, and the corrections of one step for each of
// its rows. The rows of a group share one division (1/x = yzw / xyzw); otherwise division, not
// memory, would be the limit at 4096^2. The subtraction is done in the same loop: computing a block
// of corrections first took twice as long.
struct Factors : RowGroup {  // a copy, which the stores cannot alias
  template <typename V, typename Take>
  __attribute__((always_inline)) void correct(
      const V& q, const V& h, const V& c, const Take& take) const {
    const V d0 = cosine[0] - c, d1 = cosine[1] - c;
    const V d2 = cosine[2] - c, d3 = cosine[3] - c;
    const V d01 = d0 * d1, d23 = d2 * d3;
    const V inverse = 1.0 / (d01 * d23);
    const V i01 = inverse * d23, i23 = inverse * d01;
    take(0, (high[0] * q - low[0] * h) * (i01 * d1));
    take(1, (high[1] * q - low[1] * h) * (i01 * d0));
    take(2, (high[2] * q - low[2] * h) * (i23 * d3));
    take(3, (high[3] * q - low[3] * h) * (i23 * d2));
  }
};

// Makes the compiler broadcast each factor when it is loaded: sixteen factors kept in registers
// leave too few for the rest.
inline void keep_in_memory(const Factors& factors) {
  if constexpr (kVectorBytes < 64) {
    asm volatile("" : : "r"(&factors) : "memory");
  }
}

// In float64, because numerator and denominator both cancel near the diagonal: float32 would lose a
// factor of up to 1 / |cos a - cos b| in accuracy there.
template <typename T>
void subtract_rows_typed(
    const RowGroup& group, const double* low, const double* high, const double* cosine,
    int64_t columns, T* const (&rows)[kRowGroup]) {
  const Factors factors{group};
  keep_in_memory(factors);
  int64_t j = 0;
  for (; j + kStep <= columns; j += kStep) {
    PartFloats corrections[kRowGroup][kParts];
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = j + part * kDoubles;
      factors.correct(
          read_vector<Doubles>(low + at), read_vector<Doubles>(high + at),
          read_vector<Doubles>(cosine + at),
          [&](int r, const Doubles& value) __attribute__((always_inline)) {
            corrections[r][part] = __builtin_convertvector(value, PartFloats);
          });
    }
    Floats corrected[kRowGroup];
#pragma GCC unroll 4
    for (int r = 0; r < kRowGroup; ++r) {
      corrected[r] = load(rows[r] + j) - joined(corrections[r]);
    }
    store(corrected, rows, j);
  }
  for (; j < columns; ++j) {
    factors.correct(
        low[j], high[j], cosine[j], [&](int r, double value) __attribute__((always_inline)) {
          from_float(to_float(rows[r][j]) - static_cast<float>(value), rows[r][j]);
        });
  }
}

void subtract_rows(
    const RowGroup& group, const double* low, const double* high, const double* cosine,
    int64_t columns, void* const (&rows)[kRowGroup], c10::ScalarType dtype) {
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    T* const typed[kRowGroup] = {
        static_cast<T*>(rows[0]), static_cast<T*>(rows[1]), static_cast<T*>(rows[2]),
        static_cast<T*>(rows[3])};
    subtract_rows_typed(group, low, high, cosine, columns, typed);
  };
  switch (dtype) {
    case c10::ScalarType::BFloat16:
      return run(c10::BFloat16{});
    case c10::ScalarType::Half:
      return run(c10::Half{});
    default:
      return run(float{});
  }
}

inline Doubles load_doubles(const double* p) {
  return read_vector<Doubles>(p);
}
inline Doubles load_doubles(const float* p) {
  return __builtin_convertvector(read_vector<PartFloats>(p), Doubles);
}

// Sixteen independent lanes, added up in a fixed order, so that all instruction sets give the same
// bits (float32 squares are exact in float64, so fusing changes nothing).
constexpr int kSumLanes = 16;

struct SumLanes {
  Doubles sum[kSumLanes / kDoubles] = {};
  Doubles square[kSumLanes / kDoubles] = {};

  template <typename T>                     // float or double
  void add(const T* data, int64_t count) {  // count is a multiple of kSumLanes
    SumLanes lanes = *this;                 // a copy that stays in registers
    for (int64_t j = 0; j < count; j += kSumLanes) {
#pragma GCC unroll 8
      for (int part = 0; part < kSumLanes / kDoubles; ++part) {
        const Doubles x = load_doubles(data + j + part * kDoubles);
        lanes.sum[part] += x;
        lanes.square[part] += x * x;
      }
    }
    *this = lanes;
  }

  SumPair total() const {
    double sums[kSumLanes], squares[kSumLanes];
    __builtin_memcpy(sums, sum, sizeof(sums));
    __builtin_memcpy(squares, square, sizeof(squares));
    SumPair result{0.0, 0.0};
    for (int lane = 0; lane < 8; ++lane) {
      result.sum += sums[lane] + sums[lane + 8];
      result.sum_of_squares += squares[lane] + squares[lane + 8];
    }
    return result;
  }
};

constexpr int64_t kSumTile = 256;

template <typename T>
SumPair sums_typed(const T* data, int64_t stride, int64_t count) {
  constexpr bool is_double = std::is_same_v<T, double>;
  using Element = std::conditional_t<is_double, double, float>;
  SumLanes lanes;
  Element tile[kSumTile];
  int64_t begin = 0;
  if constexpr (std::is_same_v<T, Element>) {
    if (stride == 1) {
      begin = count / kSumLanes * kSumLanes;
      lanes.add(data, begin);
    }
  }
  for (; begin < count; begin += kSumTile) {
    const int64_t size = std::min(kSumTile, count - begin);
    const T* source = data + begin * stride;
    int64_t j = 0;
    if constexpr (!is_double) {
      for (; stride == 1 && j + kStep <= size; j += kStep) {
        store(load(source + j), tile + j);
      }
    }
    for (; j < size; ++j) {
      if constexpr (is_double) {
        tile[j] = source[j * stride];
      } else {
        tile[j] = to_float(source[j * stride]);
      }
    }
    const int64_t padded = (size + kSumLanes - 1) / kSumLanes * kSumLanes;
    std::fill(tile + size, tile + padded, Element(0));
    lanes.add(tile, padded);
  }
  return lanes.total();
}

SumPair sums(const void* data, c10::ScalarType dtype, int64_t stride, int64_t count) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return sums_typed(static_cast<const double*>(data), stride, count);
    case c10::ScalarType::BFloat16:
      return sums_typed(static_cast<const c10::BFloat16*>(data), stride, count);
    case c10::ScalarType::Half:
      return sums_typed(static_cast<const c10::Half*>(data), stride, count);
    default:
      return sums_typed(static_cast<const float*>(data), stride, count);
  }
}

// The indices of one row are computed in a vector, 16 or 8 steps at a time, followed by a gather
// instruction.
void gather_row(
    const float* table, uint32_t period, uint32_t index, uint32_t step, float* out, int64_t count) {
  int64_t j = 0;
#if defined(LORA_GATHER16) || defined(LORA_GATHER8)
#if defined(LORA_GATHER16)
  constexpr int kWidth = 16;
#else
  constexpr int kWidth = 8;
#endif
  alignas(64) uint32_t lanes[kWidth];
  uint64_t lane_index = index;
  for (int lane = 0; lane < kWidth; ++lane) {
    lanes[lane] = static_cast<uint32_t>(lane_index);
    lane_index = (lane_index + step) % period;
  }
  const auto stride = static_cast<int>(static_cast<uint64_t>(step) * kWidth % period);
#if defined(LORA_GATHER16)
  auto at = _mm512_load_si512(lanes);
  const auto advance = _mm512_set1_epi32(stride), wrap = _mm512_set1_epi32(period);
  for (; j + kWidth <= count; j += kWidth) {
    _mm512_storeu_ps(out + j, _mm512_i32gather_ps(at, table, 4));
    at = _mm512_add_epi32(at, advance);
    at = _mm512_min_epu32(at, _mm512_sub_epi32(at, wrap));
  }
#else
  auto at = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
  const auto advance = _mm256_set1_epi32(stride), wrap = _mm256_set1_epi32(period);
  for (; j + kWidth <= count; j += kWidth) {
    _mm256_storeu_ps(out + j, _mm256_i32gather_ps(table, at, 4));
    at = _mm256_add_epi32(at, advance);
    at = _mm256_min_epu32(at, _mm256_sub_epi32(at, wrap));
  }
#endif
  index = static_cast<uint32_t>((index + static_cast<uint64_t>(step) * j) % period);
#endif
  for (; j < count; ++j) {
    out[j] = table[index];
    index += step;
    index = std::min(index, index - period);  // unsigned: wraps around unless it is past the period
  }
}

// Philox4x32-10 (Salmon et al., SC'11) on kLanes counters at a time; counter = (column / 4, row).
constexpr int kLanes = 16;

void philox_words(int64_t row, int64_t first_quad, uint64_t seed, uint32_t (&words)[4][kLanes]) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    c0[lane] = static_cast<uint32_t>(first_quad + lane);
    c1[lane] = 0;
    c2[lane] = static_cast<uint32_t>(row);
    c3[lane] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
  }
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0[lane];
      const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2[lane];
      c0[lane] = static_cast<uint32_t>(p1 >> 32) ^ c1[lane] ^ k0;
      c2[lane] = static_cast<uint32_t>(p0 >> 32) ^ c3[lane] ^ k1;
      c1[lane] = static_cast<uint32_t>(p1);
      c3[lane] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  __builtin_memcpy(words[0], c0, sizeof(c0));
  __builtin_memcpy(words[1], c1, sizeof(c1));
  __builtin_memcpy(words[2], c2, sizeof(c2));
  __builtin_memcpy(words[3], c3, sizeof(c3));
}

template <typename T>
void dropout_typed(const T* x, T* out, int64_t row, int64_t count, const Philox& philox) {
  uint32_t words[4][kLanes];
  float factor[4 * kLanes];
  for (int64_t j = 0; j < count; j += 4 * kLanes) {
    philox_words(row, (philox.first_column + j) / 4, philox.seed, words);
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int w = 0; w < 4; ++w) {
        factor[4 * lane + w] = words[w][lane] < philox.threshold ? 0.0f : philox.keep_scale;
      }
    }
    const int64_t block = std::min<int64_t>(4 * kLanes, count - j);
    for (int64_t k = 0; k < block; ++k) {
      if constexpr (std::is_same_v<T, double>) {
        out[j + k] = factor[k] == 0.0f ? 0.0 : x[j + k] * static_cast<double>(factor[k]);
      } else {
        const float value = to_float(x[j + k]);
        from_float(factor[k] == 0.0f ? 0.0f : value * factor[k], out[j + k]);
      }
    }
  }
}

void dropout_row(
    const void* x, void* out, c10::ScalarType dtype, int64_t row, int64_t count,
    const Philox& philox) {
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    dropout_typed(static_cast<const T*>(x), static_cast<T*>(out), row, count, philox);
  };
  switch (dtype) {
    case c10::ScalarType::Double:
      return run(double{});
    case c10::ScalarType::BFloat16:
      return run(c10::BFloat16{});
    case c10::ScalarType::Half:
      return run(c10::Half{});
    default:
      return run(float{});
  }
}

}  // namespace
}  // namespace LORA_ISA

}  // namespace lora
