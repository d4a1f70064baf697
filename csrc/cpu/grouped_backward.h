// The gradients of lora::grouped_linear.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace lora::grouped {

constexpr int64_t kMostRows = 256;  // in a task

// (x, bias, lora_A, lora_B); gradients that are not needed are empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> grouped_linear_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& ends,
    const std::optional<at::Tensor>& rows, const at::Tensor& lora_A, const at::Tensor& lora_B,
    const at::Tensor& z, double scaling, double dropout, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& start_A, const std::optional<at::Tensor>& start_B,
    std::array<bool, 4> needs);

}  // namespace lora::grouped
