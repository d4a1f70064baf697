// The kernels of the SVD driver. They take raw device pointers and a stream and do not use torch,
// so that nvcc alone compiles them. Each launcher returns the first error of its launches and does
// not wait. The same input gives the same bits: sums have a fixed order, and there are no atomic
// operations.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace lora {
namespace cuda {

// out [rows, cols], with rows ld >= cols elements apart: standard normal numbers; entry (i, j) is a
// function of (seed, i, j) only. The words are those of Philox4x32-10 (Salmon et al., SC'11) with
// key = seed and counter = (j / 4, 1, i); the Box-Muller transform is in float64, rounded to
// float32.
cudaError_t launch_gaussian_sketch(
    float* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed, cudaStream_t stream);

// The same, rounded once more to bfloat16 (given by its bits).
cudaError_t launch_gaussian_sketch(
    uint16_t* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed, cudaStream_t stream);

// From gram [batch, size, size], of which the lower triangles are read: inverse [batch, size,
// size], upper triangular, R^-1 where gram = R^T R. The columns of Z R^-1 are orthonormal if gram =
// Z^T Z. A column is dropped if its pivot (its squared norm minus the part in the span of the
// columns before it) is not above `tolerance`, or if it contains or leads to NaN or Inf: its row
// and column of the inverse are then zero, and later columns are not eliminated with it. So the
// inverse is always finite.
cudaError_t launch_cholesky_inverse(
    const double* gram, double* inverse, int64_t batch, int size, double tolerance,
    cudaStream_t stream);

// From matrices [batch, size, size], symmetric and positive semi-definite up to rounding, of which
// the lower triangles are read: values [batch, size], descending, and vectors [batch, size, size]
// with the eigenvectors as orthonormal columns. Values are never negative, and 0 where rounding
// left no pivot, as in a singular matrix. A matrix with a NaN or Inf, or far from semi-definite,
// gives NaN. `workspace` has jacobi_eigh_workspace(batch, size) bytes, aligned to 8. Returns
// cudaErrorInvalidValue if 28 bytes per row, or two columns, do not fit in shared memory (size >
// 3600 for 99 KB).
size_t jacobi_eigh_workspace(int64_t batch, int size);
cudaError_t launch_jacobi_eigh(
    const double* matrices, double* values, double* vectors, void* workspace, int64_t batch,
    int size, cudaStream_t stream);

}  // namespace cuda
}  // namespace lora
