"""An adapter on its own, without a model: what is trained, and what was taken out of the base.

What a model's layers give (`lora_kernels.model.lora`) and what adapter files hold meet here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTORS = ("lora_A", "lora_B", "lora_R", "start_A", "start_B")  # an adapter's tensors


@dataclass
class LayerState:
    """The adapter of one linear layer, W_base + s·(BA − B₀A₀), with BRA for BA if there is an R.

    `lora_A` [r, in], `lora_B` [out, r], `lora_R` [r, r] or None; s = `scaling`. The start that is
    taken out, s·B₀A₀, is the DST start of scale `beta` (A₀ = βΦᵀ, B₀ = βΦ, in A's dtype), or
    `start_A` [r, in] and `start_B` [out, r], or nothing if all three are None. `residual` says
    whether the layer has absorbed it ("absorb") or subtracts it ("implicit").

    `weight_norm` is ‖W_base‖_F, by which a base that is not the adapter's is recognised; None if
    nobody knows.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    lora_alpha: float
    lora_R: Tensor | None = None
    beta: float | None = None
    start_A: Tensor | None = None
    start_B: Tensor | None = None
    residual: str = "absorb"
    weight_norm: float | None = None

    @property
    def r(self) -> int:
        """The rank."""
        return self.lora_A.shape[0]

    @property
    def changes_base(self) -> bool:
        """Whether a start is taken out: then A and B alone, on the original base, are wrong."""
        return self.beta is not None or self.start_A is not None

    @torch.no_grad()
    def start_factors(self) -> tuple[Tensor, Tensor] | None:
        """A₀ [r, in] and B₀ [out, r] that are taken out, the kept ones or made again from β."""
        if self.start_A is not None:
            return self.start_A, self.start_B
        if self.beta is None:
            return None
        return dst_start(self.lora_A, self.lora_B, self.beta)

    @torch.no_grad()
    def update_factors(self) -> tuple[Tensor, Tensor]:
        """A' [k, in] and B' [out, k] with s·B'A' the change of the original base, in float32 or
        wider: k = r, or 2r if a start is taken out.
        """
        work = torch.promote_types(self.lora_A.dtype, torch.float32)
        right, left = self.lora_A.to(work), self.lora_B.to(work)
        if self.lora_R is not None:
            right = self.lora_R.to(work) @ right
        start = self.start_factors()
        if start is None:
            return right, left
        A0, B0 = (factor.to(work) for factor in start)
        return torch.cat([right, A0]), torch.cat([left, -B0], dim=1)


def dst_start(lora_A: Tensor, lora_B: Tensor, beta: float | Tensor) -> tuple[Tensor, Tensor]:
    """A₀ = βΦₘᵀ [r, in] and B₀ = βΦₙ [out, r], in the dtypes and on the devices of A and B."""
    r = lora_A.shape[0]
    A0, B0 = (
        torch.ops.lora.dst_basis(
            size,
            r,
            dtype=factor.dtype,
            device=factor.device,
            scale=torch.as_tensor(beta, dtype=torch.float64, device=factor.device),
        )
        for size, factor in ((lora_A.shape[1], lora_A), (lora_B.shape[0], lora_B))
    )
    return A0.T, B0
