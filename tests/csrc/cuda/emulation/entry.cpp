// What the tests call, by ctypes.
#include "cuda/kernels.h"

using namespace lora::cuda;

extern "C" {

int sketch_float(float* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed) {
  return launch_gaussian_sketch(out, rows, cols, ld, seed, nullptr);
}
int sketch_bfloat16(uint16_t* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed) {
  return launch_gaussian_sketch(out, rows, cols, ld, seed, nullptr);
}
int cholesky_inverse(
    const double* gram, double* inverse, int64_t batch, int size, double tolerance) {
  return launch_cholesky_inverse(gram, inverse, batch, size, tolerance, nullptr);
}
uint64_t eigh_workspace(int64_t batch, int size) {
  return jacobi_eigh_workspace(batch, size);
}
int eigh(
    const double* matrices, double* values, double* vectors, void* workspace, int64_t batch,
    int size) {
  return launch_jacobi_eigh(matrices, values, vectors, workspace, batch, size, nullptr);
}

void set_order(int order) {
  emulation::settings.order = static_cast<emulation::Order>(order);
}
void set_shared_limit(uint64_t bytes) {
  emulation::settings.shared_limit = bytes;
  emulation::allowed_shared.clear();
}

}  // extern "C"
