// Standard normal numbers as a function of (seed, row, column).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lora {

// out [rows, cols] float32, contiguous. From Philox4x32-10 words of counter (column / 4, 1, row),
// in pairs by the Box-Muller transform. The 1 distinguishes them from the words of a dropout mask.
void fill_normal(const at::Tensor& out, uint64_t seed);

}  // namespace lora
