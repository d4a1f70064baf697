// The operators of the LoRAM path on a CPU: what each kernel of the dispatch table does.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "sine.h"

namespace lora {

// out [length, rank] of any strides <- scale * rows [offset, offset + length) of the DST-I basis of
// `size`.
void fill_dst_basis(
    const at::Tensor& out, int64_t size, int64_t offset, std::optional<double> scale,
    SineTables& tables);

// -> [len, 2] float64: sum and sum of squares of each weight.
at::Tensor frobenius_stats(at::TensorList weights);

// The part of W -= coefficient * Phi_rows Phi_cols^T that one tensor sees of a (sharded) weight.
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
