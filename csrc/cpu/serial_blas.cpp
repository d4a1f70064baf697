#include "serial_blas.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>

namespace lora {
namespace {

// Returns the previous setting, or 0 if there was none. torch's MKL builds export this function.
// torch with another BLAS does not; then the number of threads is set globally.
int set_local_threads(int count) {
  using Set = int (*)(int);
  static const auto mkl = reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
  if (mkl != nullptr) {
    return mkl(count);
  }
  const int before = at::get_num_threads();
  at::set_num_threads(count);
  return before;
}

}  // namespace

SerialBlas::SerialBlas() : before_(set_local_threads(1)) {}

SerialBlas::~SerialBlas() {
  set_local_threads(before_);
}

}  // namespace lora
