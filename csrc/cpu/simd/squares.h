// Sums of squares of W + a b, tile by tile in registers, see SquareTile in kernels.h. Parsed for
// the target of LORA_ISA, see vectors.h.
#pragma once

#include "vectors.h"

namespace lora {
namespace LORA_ISA {
namespace {

// Rows of a register tile of two vectors: 8 with the 32 registers of AVX-512, 4 with 16.
constexpr int kTileRows = kVectorBytes < 64 ? 4 : 8;
constexpr int kSquareBytes = 2 * kVectorBytes;
static_assert(kSquareRows % kTileRows == 0);

template <typename T>
struct SquareLanes {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Number;
  typedef Number Numbers __attribute__((vector_size(kVectorBytes)));
  static constexpr int kWidth = kVectorBytes / sizeof(T), kPanel = 2 * kWidth;

  static Numbers lane() {
    Numbers numbers;
    for (int l = 0; l < kWidth; ++l) {
      numbers[l] = l;
    }
    return numbers;
  }

  static double total(const Vector& x) {
    double sum = 0.0;
    for (int l = 0; l < kWidth; ++l) {
      sum += x[l];
    }
    return sum;
  }
};

inline void prefetch_ahead(const SquareTile& tile, int first, int64_t panel) {
  if (tile.ahead == 0) {
    return;
  }
  for (int i = 0; i < kTileRows; ++i) {
    const uintptr_t line = tile.ahead + (first + i) * tile.ahead_row + panel * tile.ahead_panel;
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
    if (kSquareBytes > 64 && tile.ahead_panel > 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(line + 64), 0, 2);
    }
  }
}

// The squares of W + a b and of W in one panel, in the tile's rows from `first` on.
template <typename T>
inline void square_panel(
    const SquareTile& tile, int first, int64_t panel,
    typename SquareLanes<T>::Vector (&squares)[kTileRows][2],
    typename SquareLanes<T>::Vector (&bases)[kTileRows][2]) {
  using L = SquareLanes<T>;
  using Vector = typename L::Vector;
  const int64_t depth = tile.depth;
  const T* a = static_cast<const T*>(tile.a) + first;
  const T* b = static_cast<const T*>(tile.b) + panel * depth * L::kPanel;
  prefetch_ahead(tile, first, panel);
  Vector sums[kTileRows][2];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    const T* row = static_cast<const T*>(tile.rows[first + i]) + panel * L::kPanel;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      sums[i][v] = read_vector<Vector>(row + v * L::kWidth);
      bases[i][v] = sums[i][v] * sums[i][v];
    }
  }
  for (int64_t k = 0; k < depth; ++k, a += kSquareRows, b += L::kPanel) {
    const Vector left = read_vector<Vector>(b), right = read_vector<Vector>(b + L::kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      sums[i][0] += a[i] * left;
      sums[i][1] += a[i] * right;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    squares[i][0] = sums[i][0] * sums[i][0];
    squares[i][1] = sums[i][1] * sums[i][1];
  }
}

template <typename T>
void row_squares(const SquareTile& tile, double* sums, double* sizes) {
  using L = SquareLanes<T>;
  using Vector = typename L::Vector;
  Vector sum[kSquareRows] = {}, size[kSquareRows] = {};
  for (int64_t j = 0, panel = 0; j < tile.columns; j += L::kPanel, ++panel) {
    for (int first = 0; first < kSquareRows; first += kTileRows) {
      Vector squares[kTileRows][2], bases[kTileRows][2];
      square_panel<T>(tile, first, panel, squares, bases);
      if (j + L::kPanel > tile.columns) {
        // The last columns of a panel are not W's. b is zero there, but a may be infinite.
        const auto end = static_cast<typename L::Number>(tile.columns - j);
        for (int i = 0; i < kTileRows; ++i) {
          squares[i][0] = L::lane() < end ? squares[i][0] : Vector{};
          squares[i][1] = L::lane() + L::kWidth < end ? squares[i][1] : Vector{};
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        sum[first + i] += squares[i][0] + squares[i][1];
        size[first + i] += bases[i][0] + bases[i][1];
      }
    }
  }
  for (int i = 0; i < tile.count; ++i) {
    sums[i] += L::total(sum[i]);
    sizes[i] += L::total(size[i]);
  }
}

template <typename T>
void column_squares(const SquareTile& tile, T* sums, T* sizes) {
  using L = SquareLanes<T>;
  using Vector = typename L::Vector;
  for (int64_t j = 0, panel = 0; j < tile.columns; j += L::kPanel, ++panel) {
    Vector sum[2] = {}, size[2] = {};
    for (int first = 0; first < tile.count; first += kTileRows) {
      Vector squares[kTileRows][2], bases[kTileRows][2];
      square_panel<T>(tile, first, panel, squares, bases);
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i) {
        const bool counts = first + i < tile.count;
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          sum[v] += counts ? squares[i][v] : Vector{};
          size[v] += counts ? bases[i][v] : Vector{};
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      T *to = sums + j + v * L::kWidth, *to_size = sizes + j + v * L::kWidth;
      write_vector(read_vector<Vector>(to) + sum[v], to);
      write_vector(read_vector<Vector>(to_size) + size[v], to_size);
    }
  }
}

void row_squares_f32(const SquareTile& tile, double* sums, double* sizes) {
  row_squares<float>(tile, sums, sizes);
}
void row_squares_f64(const SquareTile& tile, double* sums, double* sizes) {
  row_squares<double>(tile, sums, sizes);
}
void column_squares_f32(const SquareTile& tile, float* sums, float* sizes) {
  column_squares<float>(tile, sums, sizes);
}
void column_squares_f64(const SquareTile& tile, double* sums, double* sizes) {
  column_squares<double>(tile, sums, sizes);
}

}  // namespace
}  // namespace LORA_ISA
}  // namespace lora
