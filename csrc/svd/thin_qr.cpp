#include "thin_qr.h"

#include <ATen/ATen.h>

namespace lora {

std::tuple<at::Tensor, at::Tensor> thin_qr(const Engine& engine, const at::Tensor& leading) {
  const auto work = engine.options.dtype();
  const int64_t r = leading.size(-1);
  // Householder's QR in float64: with r columns it costs less than the pass over W that follows.
  auto [Q, corner] = at::linalg_qr(leading.to(at::kDouble));
  const auto sign = at::where(corner.diagonal(0, -2, -1) < 0, -1.0, 1.0);  // [count, r]
  Q = (Q * sign.unsqueeze(-2)).to(work).contiguous();
  corner = (corner * sign.unsqueeze(-1)).triu().to(work);
  // Q^T W is computed as (W^T Q)^T; the engine's W is W^T if W is wide.
  auto R = (engine.flipped ? engine.exact_times(Q) : engine.exact_transposed_times(Q)).mT();
  R = R.contiguous();
  R.narrow(-1, 0, r).copy_(corner);
  return {Q, R};
}

}  // namespace lora
