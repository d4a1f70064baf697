// lora_kernels._C: importing it registers the kernels under torch.ops.lora; what it holds itself
// only tells how it was built.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.def(
      "cpu_capability", [] { return lora::kernels().name; },
      "The instruction set the CPU kernels run with: baseline, avx2 or avx512.");
  m.attr("torch_version") = TORCH_VERSION;
}
