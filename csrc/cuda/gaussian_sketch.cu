#include <algorithm>

#include "kernels.h"
#include "launch.h"

// One thread computes four columns. Philox takes 80 integer instructions for them, the Box-Muller
// transform about 250 float64 ones. On an H200 (132 SMs, 64 float64 lanes, 1.98 GHz) arithmetic is
// the limit: 15 ps for four columns, compared with 5 ps for their 16 bytes. 32 sketches of 4096 x
// 64: predicted 35 us.

namespace lora {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;  // starting more than about 30 per SM only costs time
constexpr uint32_t kSketch = 1;       // the counter's second word, which is 0 for a dropout mask

struct Words {
  uint32_t w[4];
};

__device__ Words philox(uint32_t quad, int64_t row, uint64_t seed) {
  uint32_t c0 = quad, c1 = kSketch;
  uint32_t c2 = static_cast<uint32_t>(row), c3 = static_cast<uint32_t>(row >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Two normal numbers from a word for the radius, converted to (0, 1], and one for the angle.
__device__ void box_muller(uint32_t radius, uint32_t angle, float& first, float& second) {
  constexpr double kUnit = 1.0 / 4294967296.0;  // 2^-32
  const double r = sqrt(-2.0 * log((radius + 1.0) * kUnit));
  double sine, cosine;
  sincospi(2.0 * kUnit * angle, &sine, &cosine);
  first = static_cast<float>(r * cosine);
  second = static_cast<float>(r * sine);
}

__device__ void store(float value, float* out) {
  *out = value;
}
__device__ void store(float value, uint16_t* out) {  // rounds to nearest even; the value is finite
  const uint32_t bits = __float_as_uint(value);
  *out = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    fill_normals(T* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed) {
  const int64_t quads = (cols + 3) / 4;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < rows * quads;
       at += step) {
    const int64_t row = at / quads, quad = at % quads;
    const Words words = philox(static_cast<uint32_t>(quad), row, seed);
    float normal[4];
    box_muller(words.w[0], words.w[1], normal[0], normal[1]);
    box_muller(words.w[2], words.w[3], normal[2], normal[3]);
    T* const to = out + row * ld + 4 * quad;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (4 * quad + k < cols) {
        store(normal[k], to + k);
      }
    }
  }
}

template <typename T>
cudaError_t launch(
    T* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed, cudaStream_t stream) {
  if (rows == 0 || cols == 0) {
    return cudaSuccess;
  }
  const int64_t blocks = (rows * ((cols + 3) / 4) + kThreads - 1) / kThreads;
  LORA_LAUNCH(
      fill_normals<T>, static_cast<unsigned>(std::min(blocks, kMaxBlocks)), kThreads, 0, stream,
      out, rows, cols, ld, seed);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_gaussian_sketch(
    float* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed, cudaStream_t stream) {
  return launch(out, rows, cols, ld, seed, stream);
}

cudaError_t launch_gaussian_sketch(
    uint16_t* out, int64_t rows, int64_t cols, int64_t ld, uint64_t seed, cudaStream_t stream) {
  return launch(out, rows, cols, ld, seed, stream);
}

}  // namespace cuda
}  // namespace lora
