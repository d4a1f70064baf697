// The first columns of a QR decomposition.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "engine.h"

namespace lora {

// Q [count, rows, r] and R [count, r, cols] of the weights as they are (not the tall ones), with
// R_ii >= 0. `leading` [count, rows, r]: their first r columns.
std::tuple<at::Tensor, at::Tensor> thin_qr(const Engine& engine, const at::Tensor& leading);

}  // namespace lora
