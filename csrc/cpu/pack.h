// Copies parts of a matrix's rows, of any dtype and stride, to the precision of a product.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd/kernels.h"

namespace lora {

constexpr int64_t kMaxPacked = 256;  // entries of a row that are packed at a time

constexpr int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

template <typename T, typename Out>
void copy_strided(const void* source, int64_t stride, int64_t count, Out* out) {
  const auto* x = static_cast<const T*>(source);
  if (stride == 1 && std::is_same_v<T, Out>) {
    std::memcpy(out, x, count * sizeof(T));
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    out[j] = static_cast<Out>(x[j * stride]);
  }
}

// Converts `count` <= kMaxPacked entries from `source`, `stride` apart, and multiplies them by
// `factor`.
template <typename Out>
void pack_row(
    const char* source, c10::ScalarType dtype, int64_t stride, double factor, int64_t count,
    Out* out) {
  if (dtype == c10::ScalarType::Double) {
    copy_strided<double>(source, stride, count, out);
  } else if (dtype == c10::ScalarType::Float) {
    copy_strided<float>(source, stride, count, out);
  } else {
    uint16_t gathered[kMaxPacked];
    if (stride != 1) {
      copy_strided<uint16_t>(source, stride, count, gathered);
      source = reinterpret_cast<const char*>(gathered);
    }
    if constexpr (std::is_same_v<Out, float>) {
      kernels().widen_row(source, dtype, out, count);
    } else {
      float wide[kMaxPacked];
      kernels().widen_row(source, dtype, wide, count);
      copy_strided<float>(wide, 1, count, out);
    }
  }
  if (factor != 1.0) {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = static_cast<Out>(out[j] * factor);  // the factor may exceed float32's range
    }
  }
}

}  // namespace lora
