// Where oneDNN has no kernel for a 16-bit dtype, torch multiplies scalar by scalar: x W with 64
// tokens and 4096^2 takes 7.7 s in bfloat16 below AVX-512, and 7.4 s in float16 without
// AVX512-FP16, compared with 0.017 s in float32 (2 threads of Zen 4). In those cases the larger
// matrix is converted to float32 tile by tile (gemm.h), without a float32 copy of W.
#include "product.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "gemm.h"
#include "simd/kernels.h"

namespace lora {
namespace {

// The number of float32 entries of a product computed at a time: 16 MB, but enough rows for many
// threads.
constexpr int64_t kEntries = 1 << 22, kLeastRows = 4096;

// Calls take(part, begin) with the float32 rows of a b from `begin` on.
template <typename Take>
void widened_rows(const at::Tensor& a, const at::Tensor& b, const Take& take) {
  const auto operand = b.to(at::kFloat).contiguous();
  const int64_t rows = a.size(0), columns = b.size(1);
  const int64_t step = std::max(kLeastRows, kEntries / std::max<int64_t>(1, columns));
  for (int64_t begin = 0; begin < rows; begin += step) {
    const int64_t count = std::min(step, rows - begin);
    auto part = at::empty({count, columns}, operand.options());
    gemm(Arithmetic::kFloat, a.narrow(0, begin, count), operand, part);
    take(part, begin);
  }
}

// Calls take(where, part): `part` has the entries `where` of a b, in float32. The larger factor is
// not copied.
template <typename Take>
void widened(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const Take& take) {
  if (a.numel() >= b.numel()) {
    widened_rows(a, b, [&](const at::Tensor& part, int64_t begin) {
      take(out.narrow(0, begin, part.size(0)), part);
    });
  } else {
    widened_rows(b.t(), a.t(), [&](const at::Tensor& part, int64_t begin) {
      take(out.narrow(1, begin, part.size(0)), part.t());
    });
  }
}

// Few rows times a matrix whose columns are contiguous: torch has fast inner products, 1.6 ms per
// row of 4096^2, whereas a strip of 16 rows takes 10 ms (1 thread, AVX2).
constexpr int64_t kInnerProducts = 4;

bool widens(const at::Tensor& a, const at::Tensor& b) {
  if (has_quick_products(a.scalar_type()) || a.numel() == 0 || b.numel() == 0) {
    return false;
  }
  return a.size(0) > kInnerProducts || a.stride(1) != 1 || b.stride(0) != 1;
}

}  // namespace

at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  if (!widens(a, b)) {
    return at::mm(a, b);
  }
  auto out = at::empty({a.size(0), b.size(1)}, a.options());
  widened(out, a, b, [](at::Tensor where, const at::Tensor& part) { where.copy_(part); });
  return out;
}

at::Tensor base_product(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  if (!widens(x, weight.t())) {
    return at::linear(x, weight, bias);
  }
  if (!bias) {
    return product(x, weight.t());
  }
  auto out = bias->expand({x.size(0), weight.size(0)}).clone(at::MemoryFormat::Contiguous);
  add_product_(out, x, weight.t(), 1.0);
  return out;
}

void add_product_(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, double alpha) {
  if (!widens(a, b)) {
    out.addmm_(a, b, 1, alpha);
    return;
  }
  widened(out, a, b, [&](at::Tensor where, const at::Tensor& part) { where.add_(part, alpha); });
}

}  // namespace lora
