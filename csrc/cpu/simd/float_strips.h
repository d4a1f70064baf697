// Strips of float32 and float64, and the conversion of half-precision rows to float32 before
// packing. Parsed for the target of LORA_ISA, see vectors.h.
#pragma once

#include "rows.h"
#include "strip.h"

namespace lora {
namespace LORA_ISA {
namespace {

void strip_f32(const Strip& strip, const Prefetch& prefetch) {
  multiply_strip<Lanes<float>>(strip, prefetch);
}

void strip_f64(const Strip& strip, const Prefetch& prefetch) {
  multiply_strip<Lanes<double>>(strip, prefetch);
}

template <typename T>
void widen_typed(const T* x, float* out, int64_t count) {
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) {
    store(load(x + j), out + j);
  }
  for (; j < count; ++j) {
    out[j] = to_float(x[j]);
  }
}

void widen_row(const void* x, c10::ScalarType dtype, float* out, int64_t count) {
  if (dtype == c10::ScalarType::BFloat16) {
    widen_typed(static_cast<const c10::BFloat16*>(x), out, count);
  } else {
    widen_typed(static_cast<const c10::Half*>(x), out, count);
  }
}

}  // namespace
}  // namespace LORA_ISA
}  // namespace lora
