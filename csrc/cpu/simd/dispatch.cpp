#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <iterator>
#include <string>

#include "kernels.h"

namespace lora {
namespace {

// In ascending order. `pairs` is null where the set has no products of bfloat16.
struct Level {
  const char* name;
  const Kernels& (*kernels)();
  const PairKernels& (*pairs)();
  bool (*supported)();
};

const Level kLevels[] = {
    {"baseline", kernels_baseline, nullptr, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", kernels_avx2, nullptr,
     [] {
       // Every processor with AVX2 has F16C, which is used too; clang 14 cannot check for it by
       // name.
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
    {"avx512", kernels_avx512, nullptr,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx512bf16", kernels_avx512, kernels_avx512bf16,
     [] { return __builtin_cpu_supports("avx512bf16") > 0; }},
#endif
};

#if defined(__x86_64__)
// Older versions of GCC and clang cannot check for it by name.
bool has_avx512fp16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 23 & 1u) != 0;
}
#endif

int highest() {
  int level = 0;
  while (level + 1 < static_cast<int>(std::size(kLevels)) && kLevels[level + 1].supported()) {
    ++level;
  }
  return level;
}

std::atomic<int>& chosen() {
  static std::atomic<int> level{highest()};
  return level;
}

const Level& current() {
  return kLevels[chosen().load(std::memory_order_relaxed)];
}

}  // namespace

const Kernels& kernels() {
  return current().kernels();
}

const PairKernels* pair_kernels() {
  const auto& level = current();
  return level.pairs == nullptr ? nullptr : &level.pairs();
}

bool has_quick_products(c10::ScalarType dtype) {
#if defined(__x86_64__)
  // oneDNN has bfloat16 kernels from AVX-512 on, and float16 kernels with AVX512-FP16.
  const bool avx512 = current().kernels == kernels_avx512;
  if (dtype == c10::ScalarType::BFloat16) {
    return avx512;
  }
  if (dtype == c10::ScalarType::Half) {
    return avx512 && has_avx512fp16();
  }
#endif
  return true;
}

const char* cpu_capability() {
  return current().name;
}

std::vector<std::string> cpu_capabilities() {
  std::vector<std::string> names;
  for (int level = 0; level <= highest(); ++level) {
    names.emplace_back(kLevels[level].name);
  }
  return names;
}

bool set_cpu_capability(const std::string& name) {
  for (int level = 0; level <= highest(); ++level) {
    if (name == kLevels[level].name) {
      chosen() = level;
      return true;
    }
  }
  return false;
}

}  // namespace lora
