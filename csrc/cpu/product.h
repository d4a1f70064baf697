// Products of the layer's matrices, including 16-bit dtypes for which torch has no fast products.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace lora {

// a b in their common dtype, summed in float32 (float64 for float64).
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

// x W^T + bias, rounded once; the bias is optional.
at::Tensor base_product(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// out += alpha a b, rounded once.
void add_product_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha);

}  // namespace lora
