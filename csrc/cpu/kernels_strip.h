// Strips of products with a thin matrix (see Strip in kernels.h). Included by kernels_<isa>.cpp
// after LORA_ISA and the target are set, like kernels_impl.h: no include guard and no #include.

namespace lora {
namespace LORA_ISA {
namespace {

// Rows of the register tile for two vectors of 64 bytes, and for one: what the set has registers
// for, besides two for b and one for a.
#if defined(LORA_STRIP_ROWS_2)
constexpr int kRowsOf2 = LORA_STRIP_ROWS_2, kRowsOf1 = LORA_STRIP_ROWS_1;
#else
constexpr int kRowsOf2 = 1, kRowsOf1 = 3;
#endif
static_assert(kStripRows % kRowsOf2 == 0 && kStripRows % kRowsOf1 == 0);

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

// Arithmetic on 64-byte vectors of T: `T` scalars of a, or (in kernels_avx512bf16.cpp) pairs.
template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(64)));
  using A = T;
  using C = T;
  static constexpr int kWidth = 64 / sizeof(T);
  static Vector load(const T* p) { return read_vector<Vector>(p); }
  static void add_product(Vector& sum, const T& a, const Vector& b) { sum += (Vector{} + a) * b; }
};

template <typename L, int kRows, int kVectors>
void multiply_rows(
    const typename L::A* a, const typename L::A* b, typename L::C* c, const Strip& strip,
    const Line& line) {
  constexpr int kWidth = L::kWidth;
  typename L::Vector sums[kRows][kVectors];
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      sums[i][v] = read_vector<typename L::Vector>(c + i * strip.c_row + v * kWidth);
    }
  }
  const int64_t b_step = strip.vectors * kWidth;
  for (int64_t k = 0; k < strip.depth; ++k) {
    line.touch(k);
    decltype(L::load(b)) columns[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = L::load(b + k * b_step + v * kWidth);
    }
    const auto* ak = a + k * strip.a_depth;
#pragma GCC unroll 24
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        L::add_product(sums[i][v], ak[i * strip.a_row], columns[v]);
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      write_vector(sums[i][v], c + i * strip.c_row + v * kWidth);
    }
  }
}

template <typename L>
void multiply_strip(const Strip& strip, const Prefetch& prefetch) {
  const auto* a = static_cast<const typename L::A*>(strip.a);
  const auto* b = static_cast<const typename L::A*>(strip.b);
  auto* c = static_cast<typename L::C*>(strip.c);
  const int step = strip.vectors == 2 ? kRowsOf2 : kRowsOf1;
  for (int64_t i = 0; i < strip.rows; i += step) {
    const Line line{prefetch.start ? prefetch.start + i * prefetch.strip_row : 0, prefetch};
    const auto* rows = a + i * strip.a_row;
    auto* out = c + i * strip.c_row;
    if (strip.vectors == 2) {
      multiply_rows<L, kRowsOf2, 2>(rows, b, out, strip, line);
    } else {
      multiply_rows<L, kRowsOf1, 1>(rows, b, out, strip, line);
    }
  }
}

}  // namespace
}  // namespace LORA_ISA
}  // namespace lora
