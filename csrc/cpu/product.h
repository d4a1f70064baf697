// Products of the layer's matrices, of dtypes of 16 bits as well where torch has no quick ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace lora {

// a b in their common dtype, summed in float32 (float64 for float64).
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

// x W^T + bias, rounded once; the bias may be absent.
at::Tensor base_product(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// out += alpha a b, rounded once.
void add_product_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha);

}  // namespace lora
