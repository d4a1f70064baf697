// The first columns of a QR decomposition.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "engine.h"

namespace lora {

// Q [count, rows, r] and R [count, r, cols] of the original weights, not the tall ones, with R_ii
// >= 0. `leading` [count, rows, r] has the weights' first r columns.
std::tuple<at::Tensor, at::Tensor> thin_qr(const Engine& engine, const at::Tensor& leading);

}  // namespace lora
