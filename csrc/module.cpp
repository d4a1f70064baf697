// lora_kernels._C: importing it registers the kernels under torch.ops.lora; what it holds itself
// tells how it was built, and which instruction set it runs with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.def("cpu_capability", lora::cpu_capability);
  m.def("cpu_capabilities", lora::cpu_capabilities);
  m.def("set_cpu_capability", lora::set_cpu_capability);
  m.attr("torch_version") = TORCH_VERSION;
}
