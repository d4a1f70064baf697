// Loads and stores of vectors as wide as a register of the instruction set LORA_ISA.
//
// This header and the headers that include it (rows.h, strip.h, float_strips.h) are parsed by
// <isa>.cpp after it has set LORA_ISA and raised the compiler's target. They include only each
// other: inline functions of any other header would be compiled for that target, and the linker
// could use that copy in the whole program. Other headers that they need are in includes.h.
#pragma once

namespace lora {
namespace LORA_ISA {
namespace {

// GCC keeps a vector wider than a register in memory and copies it at every operation: with 64
// bytes on AVX2, randomized_svd of 2048^2 at rank 64 took 2200 ms instead of 70 (2 threads).
#if defined(LORA_VECTOR_BYTES)
constexpr int kVectorBytes = LORA_VECTOR_BYTES;
#else
constexpr int kVectorBytes = 16;
#endif

// memcpy becomes a single unaligned move. An alignment attribute on a vector type would be lost
// when the type is a template argument.
template <typename Vector, typename T>
inline Vector read_vector(const T* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <typename Vector, typename T>
inline void write_vector(const Vector& v, T* p) {
  __builtin_memcpy(p, &v, sizeof(v));
}

}  // namespace
}  // namespace LORA_ISA
}  // namespace lora
