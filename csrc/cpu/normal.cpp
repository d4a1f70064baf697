#include "normal.h"

#include <ATen/Parallel.h>

#include <array>
#include <cmath>

namespace lora {
namespace {

using Words = std::array<uint32_t, 4>;

Words philox(uint32_t quad, int64_t row, uint64_t seed) {
  Words c{quad, 1, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)};
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    c = {
        static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(p1),
        static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

}  // namespace

void fill_normal(const at::Tensor& out, uint64_t seed) {
  const int64_t cols = out.size(1);
  auto* data = out.mutable_data_ptr<float>();
  at::parallel_for(0, out.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < cols; column += 4) {
        const auto words = philox(static_cast<uint32_t>(column / 4), row, seed);
        float values[4];
        for (int pair = 0; pair < 2; ++pair) {
          const double u = (words[2 * pair] + 1.0) * 0x1p-32;  // in (0, 1]
          const double angle = words[2 * pair + 1] * (0x1p-31 * 3.14159265358979323846);
          const auto radius = std::sqrt(-2.0f * std::log(static_cast<float>(u)));
          values[2 * pair] = radius * std::cos(static_cast<float>(angle));
          values[2 * pair + 1] = radius * std::sin(static_cast<float>(angle));
        }
        for (int64_t j = 0; j < std::min<int64_t>(4, cols - column); ++j) {
          data[row * cols + column + j] = values[j];
        }
      }
    }
  });
}

}  // namespace lora
