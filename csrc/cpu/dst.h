// LoRAM's operators on a CPU, as the dispatch table calls them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "sine.h"

namespace lora {

// out [length, rank], of any strides, = scale * rows [offset, offset + length) of the DST-I basis
// of `size`.
void fill_dst_basis(
    const at::Tensor& out, int64_t size, int64_t offset, std::optional<double> scale,
    SineTables& tables);

// Returns the sum and the sum of squares of each weight, [len, 2] in float64.
at::Tensor frobenius_stats(at::TensorList weights);

// W -= coefficient * Phi_rows Phi_cols^T, for one tensor that may be a shard of the weight.
struct DstPlacement {
  int64_t global_rows, global_cols;
  int64_t row_offset, col_offset;
};

struct DstSubtraction {
  at::Tensor weight;
  double coefficient;
  int64_t rank;
  DstPlacement placement;
};

void subtract_dst(const std::vector<DstSubtraction>& jobs, SineTables& tables);

}  // namespace lora
