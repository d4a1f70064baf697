#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "dst.h"
#include "simd/kernels.h"
#include "weight_view.h"

namespace lora {
namespace {

// Dense memory is one long row, divided at fixed places.
WeightView flattened(const at::Tensor& weight) {
  WeightView view(weight);
  if (view.col_stride == 1 && view.row_stride == view.cols && view.rows > 0) {
    const int64_t total = view.rows * view.cols;
    view.cols = std::min(total, kItemElements);
    view.rows = total / view.cols;
    view.row_stride = view.cols;
  }
  return view;
}

}  // namespace

at::Tensor frobenius_stats(at::TensorList weights) {
  std::vector<WeightView> views;
  views.reserve(weights.size());
  for (const auto& weight : weights) {
    if (weight.numel() > 0) {
      views.push_back(flattened(weight));
    } else {
      views.emplace_back(weight);
      views.back().rows = 0;
    }
  }
  const auto items = cut_rows(views, 1);
  std::vector<SumPair> partial(items.size());
  const auto& kernel = kernels();
  at::parallel_for(0, static_cast<int64_t>(items.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto& view = views[items[k].index];
      SumPair total{0.0, 0.0};
      for (int64_t row = items[k].begin; row < items[k].end; ++row) {
        const auto pair = kernel.sums(view.at(row, 0), view.dtype, view.col_stride, view.cols);
        total.sum += pair.sum;
        total.sum_of_squares += pair.sum_of_squares;
      }
      partial[k] = total;
    }
  });

  auto out = at::zeros({static_cast<int64_t>(weights.size()), 2}, at::kDouble);
  auto* result = out.data_ptr<double>();
  for (size_t k = 0; k < items.size(); ++k) {
    result[2 * items[k].index] += partial[k].sum;
    result[2 * items[k].index + 1] += partial[k].sum_of_squares;
  }
  for (size_t index = 0; index < views.size(); ++index) {  // the part after the last whole row
    const auto& view = views[index];
    const int64_t done = view.rows * view.cols;
    const int64_t rest = weights[index].numel() - done;
    if (rest > 0) {
      const auto pair =
          kernel.sums(view.data + done * view.element_size, view.dtype, view.col_stride, rest);
      result[2 * index] += pair.sum;
      result[2 * index + 1] += pair.sum_of_squares;
    }
  }
  return out;
}

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  m.impl("_frobenius_stats", frobenius_stats);
}

}  // namespace lora
