// The SVD engine on torch's own operators: batches of weights on a GPU, cuBLAS for the products.
#pragma once

#include <memory>
#include <vector>

#include "device_kernels.h"
#include "engine.h"

namespace lora {

// `weights`: of one shape and dtype. `kernels`: what the device has for the small parts; for those
// that it lacks torch's solvers, or the host, are used.
std::unique_ptr<Engine> aten_engine(
    const std::vector<at::Tensor>& weights, const DeviceKernels& kernels);

}  // namespace lora
