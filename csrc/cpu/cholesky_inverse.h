// The guarded inverse Cholesky factor of small Gram matrices, see Engine::cholesky_inverse.
#pragma once

#include <ATen/core/Tensor.h>

namespace lora {

// [count, b, b] float64 on any device; computed on the host, and returned on the device of `gram`.
at::Tensor cholesky_inverse_on_host(const at::Tensor& gram, double tolerance);

}  // namespace lora
