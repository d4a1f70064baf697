// lora_kernels._C: importing it registers the kernels under torch.ops.lora; what it holds itself
// only tells how it was built. By Python's own interface: pybind11's headers take 5 s to compile.
#include <Python.h>
#include <torch/version.h>

#include "cpu/kernels.h"

namespace {

PyObject* cpu_capability(PyObject* /*module*/, PyObject* /*arguments*/) {
  return PyUnicode_FromString(lora::kernels().name);
}

PyMethodDef methods[] = {
    {"cpu_capability", cpu_capability, METH_NOARGS,
     "The instruction set the CPU kernels run with: baseline, avx2 or avx512."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
