// The SVD engine on torch's operators: batches of weights on a GPU, with cuBLAS for the products.
#pragma once

#include <memory>
#include <vector>

#include "device_kernels.h"
#include "engine.h"

namespace lora {

// `weights` have one shape and dtype. `kernels` are the device's kernels for small matrices; where
// one is missing, torch's solver or the host is used.
std::unique_ptr<Engine> aten_engine(
    const std::vector<at::Tensor>& weights, const DeviceKernels& kernels);

}  // namespace lora
