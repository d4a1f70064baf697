#include "gemm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "pack.h"
#include "simd/kernels.h"
#include "weight_view.h"

namespace lora {
namespace {

// A tile of 96 rows (192 columns for a transposed A) by 256 floats or pairs fits in a core's L2
// cache together with the part of B that multiplies it. On Zen 4 this is faster than 192 x 256 and
// 96 x 128. Both counts are multiples of kStripRows.
constexpr int64_t kRowTile = 96, kColumnTile = 192, kMaxDepth = kMaxPacked;
// Columns of out that are computed together: their sums fit in the L2 cache too.
constexpr int64_t kMaxColumns = 256;
constexpr int64_t kLine = 64;
constexpr int64_t kPad = 16;  // scalars added to the row stride of a tile, to avoid powers of two

struct FloatForm {
  using A = float;
  using C = float;
  static constexpr int64_t kPerTerm = 1, kDepth = 256;
  static int lines() { return kernels().strip_lines; }
  static void strip(const Strip& s, const Prefetch& p) { kernels().strip_f32(s, p); }
};

struct DoubleForm {
  using A = double;
  using C = double;
  static constexpr int64_t kPerTerm = 1, kDepth = 128;
  static int lines() { return kernels().strip_lines; }
  static void strip(const Strip& s, const Prefetch& p) { kernels().strip_f64(s, p); }
};

struct PairForm {
  using A = uint32_t;  // the bfloat16 entries 2k and 2k + 1
  using C = float;
  static constexpr int64_t kPerTerm = 2, kDepth = 256;
  static int lines() { return 2; }
  static void strip(const Strip& s, const Prefetch& p) { pair_kernels()->strip(s, p); }
};

// tile[i][k] = A(row + i, term k); with pairs, term k consists of the entries 2k and 2k + 1.
template <typename Form>
void pack_rows(
    const WeightView& a, double factor, int64_t row, int64_t rows, int64_t term, int64_t terms,
    typename Form::A* tile, int64_t tile_row) {
  for (int64_t i = 0; i < rows; ++i) {
    const char* source = a.at(row + i, term * Form::kPerTerm);
    auto* out = tile + i * tile_row;
    if constexpr (Form::kPerTerm == 2) {
      const int64_t entries = std::min(2 * terms, a.cols - 2 * term);
      out[terms - 1] = 0;
      std::memcpy(out, source, entries * sizeof(uint16_t));
    } else {
      pack_row(source, a.dtype, a.col_stride, factor, terms, out);
    }
  }
}

// tile[k][j] = A(term k, column + j); with pairs, term k consists of the rows 2k and 2k + 1.
template <typename Form>
void pack_columns(
    const WeightView& a, double factor, int64_t column, int64_t columns, int64_t term,
    int64_t terms, typename Form::A* tile, int64_t tile_row) {
  for (int64_t k = 0; k < terms; ++k) {
    const int64_t row = (term + k) * Form::kPerTerm;
    const char* source = a.at(row, column);
    if constexpr (Form::kPerTerm == 2) {
      const char* next = row + 1 < a.rows ? a.at(row + 1, column) : nullptr;
      pair_kernels()->pair_rows(
          reinterpret_cast<const uint16_t*>(source), reinterpret_cast<const uint16_t*>(next),
          tile + k * tile_row, columns);
    } else {
      pack_row(source, a.dtype, a.col_stride, factor, columns, tile + k * tile_row);
    }
  }
}

// B in the order in which strips read it: [group][term][width]. A group is one or two lines of
// columns, with zeros after the last column.
template <typename Form>
class Operand {
 public:
  using A = typename Form::A;
  static constexpr int64_t kLineColumns = kLine / sizeof(A);

  const int64_t terms, columns, padded;  // padded: the number of columns including the zeros
  const int64_t group;                   // columns per group; the last group may have fewer

  explicit Operand(const at::Tensor& b)
      : terms((b.size(0) + Form::kPerTerm - 1) / Form::kPerTerm),
        columns(b.size(1)),
        padded(round_up(columns, kLineColumns)),
        group(Form::lines() * kLineColumns),
        packed_(at::empty({terms * padded * static_cast<int64_t>(sizeof(A))}, at::kByte)) {
    if (padded != columns) {
      packed_.zero_();
    }
    if (b.scalar_type() == at::kDouble) {
      pack(b.const_data_ptr<double>(), b);
    } else {
      pack(b.const_data_ptr<float>(), b);
    }
  }

  // The packed group that begins at `column`.
  int lines(int64_t column) const {
    return static_cast<int>(std::min(group, padded - column) / kLineColumns);
  }
  A* at_term(int64_t column, int64_t term) const {
    return data() + column * terms + term * lines(column) * kLineColumns;
  }

 private:
  template <typename Source>
  void pack(const Source* data, const at::Tensor& b) {
    const int64_t stride = b.stride(0), rows = b.size(0);
    at::parallel_for(0, terms, 256, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        for (int64_t column = 0; column < columns; column += group) {
          A* out = at_term(column, k);
          const int64_t count = std::min(group, columns - column);
          const Source* row = data + k * Form::kPerTerm * stride + column;
          if constexpr (Form::kPerTerm == 1) {
            copy_strided<Source>(row, 1, count, out);
          } else if constexpr (std::is_same_v<Source, float>) {
            const float* next = 2 * k + 1 < rows ? row + stride : nullptr;
            pair_kernels()->round_pairs(row, next, out, count);
          }
        }
      }
    });
  }

  A* data() const { return static_cast<A*>(packed_.data_ptr()); }

  at::Tensor packed_;  // a tensor for its alignment: no vector of b should cross two cache lines
};

template <typename Form>
struct Job {
  WeightView a;
  bool by_columns;  // sums are over A's columns, as stored in memory
  const Operand<Form>& b;
  typename Form::C* out;
  int64_t out_row;
  GemmOptions options;
};

// Prefetches the memory from which the next tile will be packed.
template <typename Form>
Prefetch next_tile(const Job<Form>& job, int64_t first, int64_t term) {
  Prefetch next;
  if (term >= job.b.terms || job.a.col_stride != 1) {
    return next;
  }
  const int64_t ahead = term * Form::kPerTerm, row = job.a.row_stride * job.a.element_size;
  if (job.by_columns) {
    next.start = reinterpret_cast<uintptr_t>(job.a.at(ahead, first));
    next.strip_row = job.a.element_size;
    next.one = Form::kPerTerm * row;
    next.sixteenth = 16 * next.one;
    next.second = Form::kPerTerm == 2 ? row : kLine;
  } else {
    next.start = reinterpret_cast<uintptr_t>(job.a.at(first, ahead));
    next.strip_row = next.sixteenth = row;
    next.one = kLine;
    next.second = 16 * row;
  }
  return next;
}

// Computes `count` rows of out from `first` on, for its columns from `left` on.
template <typename Form>
void multiply_tile(const Job<Form>& job, int64_t first, int64_t count, int64_t left) {
  using A = typename Form::A;
  using C = typename Form::C;
  const int64_t rows = round_up(count, kStripRows);
  const int64_t width = std::min(kMaxColumns, job.b.padded - left);
  const int64_t tile_row = (job.by_columns ? rows : Form::kDepth) + kPad;
  thread_local std::vector<A> tile((kColumnTile + kPad) * (kMaxDepth + kPad));
  thread_local std::vector<C> sums;
  sums.assign(rows * width, C(0));
  const auto pack = job.by_columns ? pack_columns<Form> : pack_rows<Form>;
  for (int64_t term = 0; term < job.b.terms; term += Form::kDepth) {
    const int64_t depth = std::min(Form::kDepth, job.b.terms - term);
    pack(job.a, job.options.factor, first, count, term, depth, tile.data(), tile_row);
    Prefetch next = next_tile(job, first, term + Form::kDepth);
    for (int64_t column = 0; column < width; column += job.b.group) {
      const Strip strip{
          tile.data(),
          job.by_columns ? 1 : tile_row,
          job.by_columns ? tile_row : 1,
          rows,
          job.b.at_term(left + column, term),
          job.b.lines(left + column),
          sums.data() + column,
          width,
          depth};
      Form::strip(strip, next);
      next = {};
    }
  }
  const auto alpha = static_cast<C>(job.options.alpha);
  for (int64_t i = 0; i < count; ++i) {
    C* out = job.out + (first + i) * job.out_row + left;
    const C* sum = sums.data() + i * width;
    const int64_t columns = std::min(width, job.b.columns - left);
    for (int64_t j = 0; j < columns; ++j) {
      out[j] = job.options.accumulate ? out[j] + alpha * sum[j] : alpha * sum[j];
    }
  }
}

template <typename Form>
void run(
    const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, const GemmOptions& options) {
  const Operand<Form> operand(b);
  const WeightView view(a);
  const Job<Form> job{view,          options.transpose != view.transposed,
                      operand,       out.mutable_data_ptr<typename Form::C>(),
                      out.stride(0), options};
  // Divided by size alone, so that the bits do not depend on the number of threads. A short output
  // is divided further, so that eight threads have work.
  const int64_t size = out.size(0), largest = job.by_columns ? kColumnTile : kRowTile;
  const int64_t tile = std::min(largest, round_up((size + 7) / 8, kStripRows));
  std::vector<std::pair<int64_t, int64_t>> tiles;  // first row, first column
  for (int64_t left = 0; left < operand.padded; left += kMaxColumns) {
    for (int64_t first = 0; first < size; first += tile) {
      if (!options.lower || first + tile > left) {
        tiles.emplace_back(first, left);
      }
    }
  }
  at::parallel_for(0, static_cast<int64_t>(tiles.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto [first, left] = tiles[t];
      multiply_tile(job, first, std::min(tile, size - first), left);
    }
  });
}

}  // namespace

bool can_pair(const at::Tensor& a) {
  return a.scalar_type() == at::kBFloat16 && pair_kernels() != nullptr &&
         WeightView(a).col_stride == 1;
}

void gemm(
    Arithmetic arithmetic, const at::Tensor& a, const at::Tensor& b, const at::Tensor& out,
    const GemmOptions& options) {
  TORCH_INTERNAL_ASSERT(a.dim() == 2 && b.dim() == 2 && out.dim() == 2);
  TORCH_INTERNAL_ASSERT(a.size(options.transpose ? 0 : 1) == b.size(0));
  TORCH_INTERNAL_ASSERT(a.size(options.transpose ? 1 : 0) == out.size(0));
  TORCH_INTERNAL_ASSERT(b.size(1) == out.size(1));
  TORCH_INTERNAL_ASSERT(b.size(1) <= 1 || (b.stride(1) == 1 && out.stride(1) == 1));
  switch (arithmetic) {
    case Arithmetic::kFloat:
      return run<FloatForm>(a, b, out, options);
    case Arithmetic::kDouble:
      return run<DoubleForm>(a, b, out, options);
    case Arithmetic::kPairs:
      TORCH_INTERNAL_ASSERT(can_pair(a) && options.factor == 1.0);
      return run<PairForm>(a, b, out, options);
  }
}

}  // namespace lora
