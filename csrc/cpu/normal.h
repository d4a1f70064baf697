// Standard normals as a function of (seed, row, column).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace lora {

// out [rows, cols] float32, contiguous: Philox4x32-10 words of counter (column / 4, 1, row), in
// pairs by Box and Muller's transform. The 1 tells them apart from a dropout mask's words.
void fill_normal(const at::Tensor& out, uint64_t seed);

}  // namespace lora
