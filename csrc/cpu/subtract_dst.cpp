// W -= coefficient * Phi_rows Phi_cols^T, without Phi in memory and at a cost independent of the
// rank.
//
// An entry is a sum of sines over k <= rank, for which the Christoffel-Darboux identity gives
//   sum_k sin(k a) sin(k b) = [sin((r+1)a) sin(r b) - sin(r a) sin((r+1)b)] / (2 (cos a - cos b)).
// In float64 this is accurate enough except, in each row, at the column whose angle is nearest to
// the row's; all other angles are at least half a grid step away. Those few entries are computed by
// Dirichlet kernels of exact integers (sine_product_sum).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "dst.h"
#include "simd/kernels.h"
#include "sine.h"
#include "weight_view.h"

namespace lora {
namespace {

constexpr int64_t kColumnBlock = 1024;  // its tables (24 KB) fit in the L1 cache

struct PreparedDst {
  WeightView view;
  DstPlacement placement;  // in the view's orientation
  int64_t rank;
  double scale;  // coefficient * sqrt(2/(n+1)) * sqrt(2/(m+1))
  const AxisFactors *row_axis, *col_axis;

  PreparedDst(const DstSubtraction& job, SineTables& tables)
      : view(job.weight), placement(job.placement), rank(job.rank) {
    if (view.transposed) {
      std::swap(placement.global_rows, placement.global_cols);
      std::swap(placement.row_offset, placement.col_offset);
    }
    scale = job.coefficient * 2.0 /
            std::sqrt(
                static_cast<double>(placement.global_rows + 1) *
                static_cast<double>(placement.global_cols + 1));
    row_axis = &tables.axis(placement.global_rows, placement.row_offset, view.rows, rank);
    col_axis = &tables.axis(placement.global_cols, placement.col_offset, view.cols, rank);
  }

  RowGroup row_group(int64_t begin, int64_t count) const {
    RowGroup out;
    for (int64_t g = 0; g < kRowGroup; ++g) {
      const int64_t i = begin + std::min(g, count - 1);
      out.low[g] = 0.5 * scale * row_axis->low[i];
      out.high[g] = 0.5 * scale * row_axis->high[i];
      out.cosine[g] = row_axis->cosine[i];
    }
    return out;
  }

  // The column of this tensor whose angle (j+1)/(cols+1) is nearest to the row's (i+1)/(rows+1).
  int64_t nearest_column(int64_t local_row) const {
    const int64_t n = placement.global_rows + 1, m = placement.global_cols + 1;
    const int64_t i = placement.row_offset + local_row + 1;
    return (2 * i * m + n) / (2 * n) - 1 - placement.col_offset;
  }

  double value(int64_t row, int64_t col, int64_t nearest, const RowGroup& group, int64_t g) const {
    if (col == nearest) {
      return scale * sine_product_sum(
                         placement.row_offset + row, placement.global_rows,
                         placement.col_offset + col, placement.global_cols, rank);
    }
    return (group.high[g] * col_axis->low[col] - group.low[g] * col_axis->high[col]) /
           (group.cosine[g] - col_axis->cosine[col]);
  }

  template <typename T>
  void run(int64_t begin, int64_t end) const {
    T before[kRowGroup][kColumnBlock];  // the entries for which the vector loop is not accurate
    T copy[kRowGroup][kColumnBlock];    // strided rows, and rows missing in the last group
    for (int64_t i = begin; i < end; i += kRowGroup) {
      const int64_t count = std::min<int64_t>(end - i, kRowGroup);
      const RowGroup group = row_group(i, count);
      int64_t nearest[kRowGroup];
      for (int64_t g = 0; g < count; ++g) {
        nearest[g] = nearest_column(i + g);
      }
      for (int64_t j = 0; j < view.cols; j += kColumnBlock) {
        const int64_t width = std::min(kColumnBlock, view.cols - j);
        const int64_t low = std::max(j, nearest[0]);
        const int64_t high = std::min(j + width - 1, nearest[count - 1]);
        void* rows[kRowGroup] = {copy[0], copy[1], copy[2], copy[3]};
        for (int64_t g = 0; g < count; ++g) {
          auto* row = reinterpret_cast<T*>(view.at(i + g, j));
          if (view.col_stride == 1) {
            rows[g] = row;
          } else {
            gather(row, copy[g], width);
          }
          if (low <= high) {
            std::copy_n(static_cast<T*>(rows[g]) + low - j, high - low + 1, before[g]);
          }
        }
        kernels().subtract_rows(
            group, col_axis->low.data() + j, col_axis->high.data() + j, col_axis->cosine.data() + j,
            width, rows, view.dtype);
        for (int64_t g = 0; g < count; ++g) {
          auto* row = static_cast<T*>(rows[g]) - j;
          for (int64_t col = low; col <= high; ++col) {
            const auto correction = static_cast<float>(value(i + g, col, nearest[g], group, g));
            row[col] = static_cast<T>(static_cast<float>(before[g][col - low]) - correction);
          }
          if (view.col_stride != 1) {
            scatter(copy[g], reinterpret_cast<T*>(view.at(i + g, j)), width);
          }
        }
      }
    }
  }

  template <typename T>
  void gather(const T* row, T* out, int64_t width) const {
    for (int64_t j = 0; j < width; ++j) {
      out[j] = row[j * view.col_stride];
    }
  }

  template <typename T>
  void scatter(const T* in, T* row, int64_t width) const {
    for (int64_t j = 0; j < width; ++j) {
      row[j * view.col_stride] = in[j];
    }
  }
};

// float64 weights need float64 corrections. Near the diagonal, the product gives these and the
// identity does not. Block by block of rows, so that no second matrix is allocated.
void subtract_double(const DstSubtraction& job, SineTables& tables) {
  constexpr int64_t block = 256;
  const auto& place = job.placement;
  auto right = at::empty({job.weight.size(1), job.rank}, job.weight.options());
  fill_dst_basis(right, place.global_cols, place.col_offset, std::nullopt, tables);
  for (int64_t begin = 0; begin < job.weight.size(0); begin += block) {
    auto rows = job.weight.narrow(0, begin, std::min(block, job.weight.size(0) - begin));
    auto left = at::empty({rows.size(0), job.rank}, job.weight.options());
    fill_dst_basis(left, place.global_rows, place.row_offset + begin, std::nullopt, tables);
    rows.sub_(at::mm(left, right.t()), job.coefficient);
  }
}

}  // namespace

void subtract_dst(const std::vector<DstSubtraction>& jobs, SineTables& tables) {
  std::vector<PreparedDst> prepared;
  std::vector<WeightView> views;
  for (const auto& job : jobs) {
    if (job.weight.numel() == 0) {
      continue;
    }
    if (job.weight.scalar_type() == at::kDouble) {
      subtract_double(job, tables);
      continue;
    }
    prepared.emplace_back(job, tables);
    views.push_back(prepared.back().view);
  }
  const auto items = cut_rows(views, kRowGroup);
  at::parallel_for(0, static_cast<int64_t>(items.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto& job = prepared[items[k].index];
      switch (job.view.dtype) {
        case at::kBFloat16:
          job.run<at::BFloat16>(items[k].begin, items[k].end);
          break;
        case at::kHalf:
          job.run<at::Half>(items[k].begin, items[k].end);
          break;
        default:
          job.run<float>(items[k].begin, items[k].end);
      }
    }
  });
}

namespace {

void subtract_dst_(
    at::Tensor weight, const at::Tensor& coefficient, int64_t rank, int64_t global_rows,
    int64_t global_cols, int64_t row_offset, int64_t col_offset) {
  const auto value = coefficient.item<double>();
  TORCH_CHECK_VALUE(
      std::isfinite(value), "subtract_dst_: coefficient is ", value, "; nothing was changed");
  SineTables tables;
  subtract_dst({{weight, value, rank, {global_rows, global_cols, row_offset, col_offset}}}, tables);
}

// Every weight is whole. All are divided into one set of tasks, with one table of sines.
void subtract_dst_foreach_(at::TensorList weights, const at::Tensor& coefficients, int64_t rank) {
  const auto values = coefficients.to(at::kDouble).contiguous();
  std::vector<DstSubtraction> jobs;
  jobs.reserve(weights.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    const double value = values.data_ptr<double>()[k];
    TORCH_CHECK_VALUE(
        std::isfinite(value), "subtract_dst_foreach_: coefficient ", k, " is ", value,
        "; nothing was changed");
    jobs.push_back({weights[k], value, rank, {weights[k].size(0), weights[k].size(1), 0, 0}});
  }
  SineTables tables;
  subtract_dst(jobs, tables);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  m.impl("_subtract_dst_", subtract_dst_);
  m.impl("_subtract_dst_foreach_", subtract_dst_foreach_);
}

}  // namespace lora
