// The kernels of the SVD driver: raw device pointers and a stream, nothing of torch, so that nvcc
// alone compiles them. Each launcher returns the first error of its launches and waits for nothing.
// Same input, same bits: sums have one fixed order and there are no atomics.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace lora {
namespace cuda {

// out [rows, cols], rows ld >= cols elements apart: standard normals, entry (i, j) a function of
// (seed, i, j) only. The words are Philox4x32-10's (Salmon et al., SC'11) at key = seed, counter =
// (j / 4, 1, i); the normals are Box and Muller's, in float64, rounded to float32.
cudaError_t launch_gaussian_sketch(
    float* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed, cudaStream_t stream);

// The same rounded once more, to bfloat16 (given by its bits).
cudaError_t launch_gaussian_sketch(
    uint16_t* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed, cudaStream_t stream);

// gram [batch, size, size], of which the lower triangles are read -> inverse [batch, size, size],
// upper triangular, R^-1 of gram = R^T R: the columns of Z R^-1 are orthonormal if gram = Z^T Z.
// A column whose pivot (its squared norm, less what the columns before it span) is not above
// `tolerance` is dropped: its row and column of the inverse are zero and later columns are not
// eliminated with it. So is one that holds or leads to NaN or Inf: the inverse is always finite.
cudaError_t launch_cholesky_inverse(
    const double* gram, double* inverse, int64_t batch, int size, double tolerance,
    cudaStream_t stream);

// matrices [batch, size, size], symmetric positive semi-definite up to rounding, of which the lower
// triangles are read -> values [batch, size] descending, vectors [batch, size, size] with the
// eigenvectors as orthonormal columns. Values are never negative, and 0 where rounding left no
// pivot, as in a singular matrix. A matrix with a NaN or Inf, or far from semi-definite, gives NaN.
// workspace: jacobi_eigh_workspace(batch, size) bytes, aligned to 8. cudaErrorInvalidValue where 28
// bytes a row, or two columns, do not fit shared memory (size > 3600 in 99 KB).
size_t jacobi_eigh_workspace(int64_t batch, int size);
cudaError_t launch_jacobi_eigh(
    const double* matrices, double* values, double* vectors, void* workspace, int64_t batch,
    int size, cudaStream_t stream);

}  // namespace cuda
}  // namespace lora
