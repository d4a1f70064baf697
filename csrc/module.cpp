// The module lora_kernels._C. Importing it registers the kernels under torch.ops.lora. Its own
// functions tell how it was built and which instruction set it uses
// (lora_kernels/ops/_backends/cpu_capability.py). It uses Python's C interface because pybind11's
// headers take 5 s to compile, and of that the stable part, so that one binary fits every Python
// from 3.10 on.
#include <Python.h>
#include <torch/version.h>

#include "cpu/simd/kernels.h"

namespace {

#if defined(LORA_CUDA_KERNELS)
constexpr long kHasCudaKernels = 1;
#else
constexpr long kHasCudaKernels = 0;
#endif

PyObject* cpu_capability(PyObject* /*module*/, PyObject* /*arguments*/) {
  return PyUnicode_FromString(lora::cpu_capability());
}

PyObject* cpu_capabilities(PyObject* /*module*/, PyObject* /*arguments*/) {
  PyObject* names = PyList_New(0);
  for (const auto& name : lora::cpu_capabilities()) {
    PyObject* text = PyUnicode_FromString(name.c_str());
    const bool added = names != nullptr && text != nullptr && PyList_Append(names, text) == 0;
    Py_XDECREF(text);
    if (!added) {
      Py_XDECREF(names);
      return nullptr;
    }
  }
  return names;
}

PyObject* set_cpu_capability(PyObject* /*module*/, PyObject* name) {
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  return text == nullptr ? nullptr : PyBool_FromLong(lora::set_cpu_capability(text));
}

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS, "The instruction set in use."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS, "All that this processor has, ascending."},
    {"set_cpu_capability", set_cpu_capability, METH_O,
     "Chooses one; False where the processor has none of that name."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr &&
      (PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION) < 0 ||
       PyModule_AddIntConstant(module, "has_cuda_kernels", kHasCudaKernels) < 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
