#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace lora {
namespace {

struct Kind {
  const at::Tensor* example;
  bool is_aligned;
};

bool is_same_kind(const at::Tensor& tensor, bool is_aligned, const Kind& kind) {
  const at::Tensor& other = *kind.example;
  return is_aligned == kind.is_aligned && tensor.scalar_type() == other.scalar_type() &&
         tensor.sizes() == other.sizes() && tensor.strides() == other.strides() &&
         tensor.device() == other.device();
}

// See lora_kernels/ops/_backends/tensor_kinds.py. A model has few kinds, so a linear search is fast
// enough.
std::tuple<at::Tensor, at::Tensor, std::vector<int64_t>> tensor_kinds(at::TensorList tensors) {
  const auto count = static_cast<int64_t>(tensors.size());
  auto numbers = at::empty({count}, at::TensorOptions(at::kCPU).dtype(at::kLong));
  auto addresses = at::empty_like(numbers);
  auto* number = numbers.mutable_data_ptr<int64_t>();
  auto* address = addresses.mutable_data_ptr<int64_t>();
  std::vector<Kind> kinds;
  std::vector<int64_t> firsts;
  for (int64_t k = 0; k < count; ++k) {
    const at::Tensor& tensor = tensors[k];
    address[k] = static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()));
    const bool is_aligned = address[k] % 16 == 0;
    size_t kind = 0;
    while (kind < kinds.size() && !is_same_kind(tensor, is_aligned, kinds[kind])) {
      ++kind;
    }
    if (kind == kinds.size()) {
      kinds.push_back({&tensor, is_aligned});
      firsts.push_back(k);
    }
    number[k] = static_cast<int64_t>(kind);
  }
  return {numbers, addresses, firsts};
}

// See lora_kernels/ops/loram_init.py.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> empty_factors(
    at::TensorList weights, int64_t rank) {
  std::vector<at::Tensor> lora_A, lora_B;
  lora_A.reserve(weights.size());
  lora_B.reserve(weights.size());
  for (const at::Tensor& weight : weights) {
    const bool is_wide = weight.scalar_type() == at::kDouble;
    const auto options = weight.options().dtype(is_wide ? at::kDouble : at::kFloat);
    lora_A.push_back(at::empty({rank, weight.size(1)}, options));
    lora_B.push_back(at::empty({weight.size(0), rank}, options));
  }
  return {std::move(lora_A), std::move(lora_B)};
}

void register_for(torch::Library& m) {
  m.impl("_tensor_kinds", tensor_kinds);
  m.impl("_empty_factors", empty_factors);
}

}  // namespace

TORCH_LIBRARY_IMPL(lora, CPU, m) {
  register_for(m);
}

TORCH_LIBRARY_IMPL(lora, CUDA, m) {
  register_for(m);
}

}  // namespace lora
