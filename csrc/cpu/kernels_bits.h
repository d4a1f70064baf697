// Vectors of the set's own width, to and from memory. Included first by kernels_<isa>.cpp, like
// kernels_impl.h: no include guard and no #include.

namespace lora {
namespace LORA_ISA {
namespace {

// Of a register. GCC keeps a wider vector in memory and copies it about at every operation: with 64
// bytes on AVX2, randomized_svd of 2048^2 at rank 64 took 2200 ms instead of 70 (2 threads).
#if defined(LORA_VECTOR_BYTES)
constexpr int kVectorBytes = LORA_VECTOR_BYTES;
#else
constexpr int kVectorBytes = 16;
#endif

// Through memcpy, which becomes one unaligned move: an alignment attribute on a vector type is lost
// as soon as the type is a template argument.
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
