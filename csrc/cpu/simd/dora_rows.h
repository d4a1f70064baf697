// The passes over a row of y and dy of a DoRA layer, see DoraRow and DoraGradRow in kernels.h.
// Parsed for the target of LORA_ISA, see vectors.h.
#pragma once

#include "rows.h"

namespace lora {
namespace LORA_ISA {
namespace {

// Entries in the precision in which they are multiplied: float64, or else float32.
template <typename T>
struct Wide {
  static constexpr int kCount = kStep;
  using Entry = float;
  using Vector = Floats;
  static Vector load_step(const T* p) { return load(p); }
  static void store_step(const Vector& x, T* p) { store(x, p); }
  static Entry load_one(const T* p) { return to_float(*p); }
  static void store_one(Entry x, T* p) { from_float(x, *p); }
};

template <>
struct Wide<double> {
  static constexpr int kCount = kDoubles;
  using Entry = double;
  using Vector = Doubles;
  static Vector load_step(const double* p) { return read_vector<Vector>(p); }
  static void store_step(const Vector& x, double* p) { write_vector(x, p); }
  static Entry load_one(const double* p) { return *p; }
  static void store_one(Entry x, double* p) { *p = x; }
};

template <typename T>
void dora_scale_typed(const DoraRow& row) {
  using W = Wide<T>;
  using Entry = typename W::Entry;
  const auto *y0 = static_cast<const T*>(row.y0), *bias = static_cast<const T*>(row.bias);
  const auto* gain = static_cast<const Entry*>(row.gain);
  auto* y = static_cast<T*>(row.y);
  int64_t j = 0;
  for (; j + W::kCount <= row.count; j += W::kCount) {
    auto value = W::load_step(y0 + j) * read_vector<typename W::Vector>(gain + j);
    if (bias != nullptr) {
      value += W::load_step(bias + j);
    }
    W::store_step(value, y + j);
  }
  for (; j < row.count; ++j) {
    Entry value = W::load_one(y0 + j) * gain[j];
    if (bias != nullptr) {
      value += W::load_one(bias + j);
    }
    W::store_one(value, y + j);
  }
}

template <typename T>
void dora_scale_grad_typed(const DoraGradRow& row) {
  using W = Wide<T>;
  using Entry = typename W::Entry;
  using Vector = typename W::Vector;
  const auto *dy = static_cast<const T*>(row.dy), *y0 = static_cast<const T*>(row.y0);
  const auto* gain = static_cast<const Entry*>(row.gain);
  auto* dy0 = static_cast<T*>(row.dy0);
  auto *gain_sums = static_cast<Entry*>(row.gain_sums),
       *bias_sums = static_cast<Entry*>(row.bias_sums);
  int64_t j = 0;
  for (; j + W::kCount <= row.count; j += W::kCount) {
    const Vector grad = W::load_step(dy + j);
    if (dy0 != nullptr) {
      W::store_step(grad * read_vector<Vector>(gain + j), dy0 + j);
    }
    if (gain_sums != nullptr) {
      const Vector product = grad * W::load_step(y0 + j);
      write_vector(read_vector<Vector>(gain_sums + j) + product, gain_sums + j);
    }
    if (bias_sums != nullptr) {
      write_vector(read_vector<Vector>(bias_sums + j) + grad, bias_sums + j);
    }
  }
  for (; j < row.count; ++j) {
    const Entry grad = W::load_one(dy + j);
    if (dy0 != nullptr) {
      W::store_one(grad * gain[j], dy0 + j);
    }
    if (gain_sums != nullptr) {
      gain_sums[j] += grad * W::load_one(y0 + j);
    }
    if (bias_sums != nullptr) {
      bias_sums[j] += grad;
    }
  }
}

// Calls run with a value of the dtype.
template <typename Run>
void with_dtype(c10::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return run(double{});
    case c10::ScalarType::BFloat16:
      return run(c10::BFloat16{});
    case c10::ScalarType::Half:
      return run(c10::Half{});
    default:
      return run(float{});
  }
}

void dora_scale_row(const DoraRow& row) {
  with_dtype(row.dtype, [&](auto tag) { dora_scale_typed<decltype(tag)>(row); });
}

void dora_scale_grad_row(const DoraGradRow& row) {
  with_dtype(row.dtype, [&](auto tag) { dora_scale_grad_typed<decltype(tag)>(row); });
}

}  // namespace
}  // namespace LORA_ISA
}  // namespace lora
