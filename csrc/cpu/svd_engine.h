// The SVD engine on a CPU: one weight at a time, using the products of gemm.h.
#pragma once

#include <memory>

#include "svd/engine.h"

namespace lora {

std::unique_ptr<Engine> cpu_engine(const at::Tensor& weight);

}  // namespace lora
