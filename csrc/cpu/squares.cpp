#include "squares.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "pack.h"
#include "simd/kernels.h"
#include "weight_view.h"

namespace lora {
namespace {

// Here W has the order of its entries in memory, see WeightView: V = W + a b, a [rows, k], b
// [k, columns]. The sums are over the columns, or over the rows if W is transposed.

// A part of b with this many bytes stays in the L2 cache while kRowBlock rows are multiplied by it.
constexpr int64_t kPartBytes = 1 << 17, kRowBlock = 64;
// The number of columns whose squares are summed in float32, before these sums are added in
// float64.
constexpr int64_t kPartColumns = 2048;
// For a transposed W: the columns that are summed together, and the rows after which their float32
// sums are added in float64. A sum is divided into at most kSumParts tasks.
constexpr int64_t kSummedColumns = kMaxPacked, kFoldedRows = 64, kSumParts = 8;

// How far ahead in its rows W is prefetched. Of a transposed W, the next rows are prefetched
// instead. The hardware's prefetching stops at the end of a page.
constexpr int64_t kAheadBytes = 1024;

struct FloatSquares {
  static void rows(const SquareTile& tile, double* sums, double* sizes) {
    kernels().row_squares_f32(tile, sums, sizes);
  }
  static void columns(const SquareTile& tile, float* sums, float* sizes) {
    kernels().column_squares_f32(tile, sums, sizes);
  }
};

struct DoubleSquares {
  static void rows(const SquareTile& tile, double* sums, double* sizes) {
    kernels().row_squares_f64(tile, sums, sizes);
  }
  static void columns(const SquareTile& tile, double* sums, double* sizes) {
    kernels().column_squares_f64(tile, sums, sizes);
  }
};

template <typename T>
using SquareForm = std::conditional_t<std::is_same_v<T, float>, FloatSquares, DoubleSquares>;

// A matrix [outer, inner] as [outer / width][inner][width], with zeros after its end.
template <typename T>
class Packed {
 public:
  Packed(const at::Tensor& matrix, int64_t width)
      : inner_(matrix.size(1)),
        width_(width),
        data_(at::empty({round_up(matrix.size(0), width) * inner_}, matrix.options())) {
    const int64_t outer = matrix.size(0), row = matrix.stride(0), column = matrix.stride(1);
    const T* in = matrix.const_data_ptr<T>();
    T* out = data_.template mutable_data_ptr<T>();
    at::parallel_for(0, (outer + width - 1) / width, 16, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = group * width, count = std::min(width, outer - first);
        for (int64_t k = 0; k < inner_; ++k) {
          T* to = out + (group * inner_ + k) * width;
          copy_strided<T>(in + first * row + k * column, row, count, to);
          std::fill(to + count, to + width, T(0));
        }
      }
    });
  }

  // From entry `outer` on, a multiple of the width.
  const T* at(int64_t outer) const { return data_.template const_data_ptr<T>() + outer * inner_; }

 private:
  int64_t inner_, width_;
  at::Tensor data_;
};

template <typename T>
class Squares {
 public:
  const WeightView view;
  const int64_t depth, panel;

  Squares(const at::Tensor& weight, const at::Tensor& left, const at::Tensor& right)
      : view(weight),
        depth(left.size(1)),
        panel(kernels().square_bytes / static_cast<int64_t>(sizeof(T))),
        a_(view.transposed ? right.t() : left, kSquareRows),
        b_(view.transposed ? left : right.t(), panel),
        direct_(view.col_stride == 1 && view.dtype == c10::CppTypeToScalarType<T>::value) {}

  // Columns whose part of b stays in the cache.
  int64_t part() const {
    const int64_t bytes = std::max<int64_t>(1, depth) * static_cast<int64_t>(sizeof(T));
    return std::max(panel, std::min(kPartColumns, kPartBytes / bytes / panel * panel));
  }

  // Adds to the sums of the rows [begin, end), where begin is a multiple of kSquareRows.
  void add_rows(int64_t begin, int64_t end, double* sums, double* sizes) const {
    T buffer[kSquareRows * kMaxPacked];
    for (int64_t left = 0; left < view.cols; left += part()) {
      const int64_t right = std::min(view.cols, left + part());
      for (int64_t row = begin; row < end; row += kSquareRows) {
        for (int64_t j = left, width = 0; j < right; j += width) {
          width = step(right - j);
          const auto tile =
              tile_at(row, std::min<int64_t>(kSquareRows, end - row), j, width, buffer);
          SquareForm<T>::rows(tile, sums + row, sizes + row);
        }
      }
    }
  }

  // Adds the sums of the rows [begin, end) to those of the columns [left, right), at most
  // kSummedColumns of them. Both `left` and `begin` are multiples of the tile's sizes.
  void add_columns(
      int64_t left, int64_t right, int64_t begin, int64_t end, double* sums, double* sizes) const {
    T buffer[kSquareRows * kMaxPacked];
    T sum[kSummedColumns + kMaxPanel], size[kSummedColumns + kMaxPanel];
    for (int64_t first = begin; first < end; first += kFoldedRows) {
      std::fill_n(sum, right - left + panel, T(0));
      std::fill_n(size, right - left + panel, T(0));
      const int64_t last = std::min(end, first + kFoldedRows);
      for (int64_t row = first; row < last; row += kSquareRows) {
        const int64_t count = std::min<int64_t>(kSquareRows, last - row);
        for (int64_t j = left, width = 0; j < right; j += width) {
          width = step(right - j);
          const auto tile = tile_at(row, count, j, width, buffer);
          SquareForm<T>::columns(tile, sum + j - left, size + j - left);
        }
      }
      for (int64_t j = left; j < right; ++j) {
        sums[j] += sum[j - left];
        sizes[j] += size[j - left];
      }
    }
  }

 private:
  static constexpr int64_t kMaxPanel = 128 / sizeof(T);

  // The next columns that one tile takes: whole panels of W itself, else a copy.
  int64_t step(int64_t columns) const {
    const int64_t whole = columns / panel * panel;
    return direct_ && whole > 0 ? whole : std::min(columns, kMaxPacked);
  }

  SquareTile tile_at(int64_t row, int64_t count, int64_t column, int64_t width, T* buffer) const {
    SquareTile tile;
    const bool copies = !direct_ || width % panel != 0;
    for (int64_t i = 0; i < kSquareRows; ++i) {
      if (i >= count) {
        tile.rows[i] = tile.rows[0];
        continue;
      }
      const char* source = view.at(row + i, column);
      tile.rows[i] = source;
      if (copies) {
        T* copy = buffer + i * kMaxPacked;
        pack_row(source, view.dtype, view.col_stride, 1.0, width, copy);
        std::fill(copy + width, copy + round_up(width, panel), T(0));
        tile.rows[i] = copy;
      }
    }
    tile.count = count;
    tile.a = a_.at(row);
    tile.b = b_.at(column);
    tile.depth = depth;
    tile.columns = width;
    if (view.col_stride == 1) {
      const int64_t row_bytes = view.row_stride * view.element_size;
      tile.ahead = reinterpret_cast<uintptr_t>(view.at(row, column)) +
                   (view.transposed ? kSquareRows * row_bytes : kAheadBytes);
      tile.ahead_row = row_bytes;
      tile.ahead_panel = panel * view.element_size;
    }
    return tile;
  }

  Packed<T> a_, b_;
  bool direct_;
};

// The ranges, divided into ranges of at most `step`.
std::vector<RowRange> divided(const std::vector<RowRange>& ranges, int64_t step) {
  std::vector<RowRange> parts;
  for (const auto& [begin, end] : ranges) {
    for (int64_t first = begin; first < end; first += step) {
      parts.emplace_back(first, std::min(end, first + step));
    }
  }
  return parts;
}

// Rows per task: a multiple of a tile's rows and, for few rows, enough tasks for eight threads.
int64_t rows_per_task(int64_t rows) {
  return std::clamp<int64_t>(round_up(rows / 8, kSquareRows), kSquareRows, kRowBlock);
}

template <typename T>
void add_by_rows(const Squares<T>& job, const std::vector<RowRange>& ranges, RowSquares& out) {
  const auto parts = divided(ranges, rows_per_task(job.view.rows));
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      job.add_rows(parts[k].first, parts[k].second, out.sums.data(), out.sizes.data());
    }
  });
}

template <typename T>
void add_by_columns(const Squares<T>& job, const std::vector<RowRange>& ranges, RowSquares& out) {
  const int64_t columns = job.view.cols, rows = job.view.rows;
  const auto blocks = divided(ranges, std::min(kSummedColumns, job.part()));
  const int64_t step =
      std::max<int64_t>(512, round_up((rows + kSumParts - 1) / kSumParts, kFoldedRows));
  const int64_t steps = (rows + step - 1) / step;
  std::vector<double> sums(steps * columns), sizes(steps * columns);
  const auto tasks = static_cast<int64_t>(blocks.size()) * steps;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto [left, right] = blocks[k / steps];
      const int64_t part = k % steps, first = part * step;
      job.add_columns(
          left, right, first, std::min(rows, first + step), sums.data() + part * columns,
          sizes.data() + part * columns);
    }
  });
  for (int64_t k = 0; k < steps * columns; ++k) {
    out.sums[k % columns] += sums[k];
    out.sizes[k % columns] += sizes[k];
  }
}

template <typename T>
RowSquares squares_in(
    const at::Tensor& weight, const at::Tensor& left, const at::Tensor& right,
    const std::vector<RowRange>& ranges) {
  const Squares<T> job(weight, left, right);
  const auto count = static_cast<size_t>(weight.size(0));
  RowSquares out{std::vector<double>(count), std::vector<double>(count)};
  if (job.view.transposed) {
    add_by_columns(job, ranges, out);
  } else {
    add_by_rows(job, ranges, out);
  }
  return out;
}

}  // namespace

RowSquares row_squares(
    const at::Tensor& weight, const at::Tensor& left, const at::Tensor& right,
    const std::vector<RowRange>& ranges) {
  return left.scalar_type() == at::kDouble ? squares_in<double>(weight, left, right, ranges)
                                           : squares_in<float>(weight, left, right, ranges);
}

}  // namespace lora
