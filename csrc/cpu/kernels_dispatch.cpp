#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace lora {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* setting = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view ceiling = setting ? setting : "";
  if (ceiling == "default") {
    return kernels_baseline();
  }
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && ceiling != "avx2") {
    return kernels_avx512();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return kernels_avx2();
  }
#endif
  return kernels_baseline();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const PairKernels* pair_kernels() {
#if defined(__x86_64__)
  if (&kernels() == &kernels_avx512() && __builtin_cpu_supports("avx512bf16")) {
    return &kernels_avx512bf16();
  }
#endif
  return nullptr;
}

}  // namespace lora
