"""LoRAM: magnitude-matched sine bases (Zhang et al., "The Primacy of Magnitude in Low-Rank
Adaptation", arXiv 2507.06558).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.loram_init import log_gain
from .base import Initializer, Start
from .registry import register_initializer


@dataclass(frozen=True)
class LoRAM(Initializer):
    """A₀ = βΦₘᵀ, B₀ = βΦₙ with Φ the DST-I basis and β² = ‖W‖_F √(Q/r), Q = ln r / ln min(n, m).

    arXiv 2507.06558, algorithm 1. Deterministic; β does not depend on the scaling s, which enters
    the subtraction W − s·B₀A₀ only. Cost: two reads and one write of W, at any rank. Rank 1 takes
    Q[2], as Q[1] = 0 would never train.
    """

    changes_base = True

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; ValueError if W is zero or holds NaN or Inf."""
        rows, cols = weight.shape
        sum_of_squares = torch.ops.lora.frobenius_stats([weight])[0, 1]
        if not bool(torch.isfinite(sum_of_squares)):
            raise ValueError("weight holds NaN or Inf: it has no magnitude to start from")
        if not bool(sum_of_squares > 0):
            raise ValueError("weight is zero, so its magnitude gives no scale")
        beta = (sum_of_squares * (log_gain(r, rows, cols) / r)) ** 0.25
        dtype = torch.promote_types(weight.dtype, torch.float32)
        lora_A = torch.ops.lora.dst_basis(cols, r, dtype=dtype, scale=beta).T.contiguous()
        lora_B = torch.ops.lora.dst_basis(rows, r, dtype=dtype, scale=beta)
        return Start(lora_A, lora_B, beta)

    def absorb_(self, weight: Tensor, r: int, scaling: float) -> Start:
        """The same start and the subtraction, as one operator."""
        return Start(*torch.ops.lora.loram_init(weight, r, scaling))


register_initializer("loram", LoRAM)
