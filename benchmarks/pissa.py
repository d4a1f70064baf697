"""PiSSA with an exact SVD, in plain torch: the reference that the demo compares LoRAM with."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import LoRALinear


@torch.no_grad()
def exact_pissa(linear: nn.Linear, r: int, lora_alpha: float) -> LoRALinear:
    """W = U S Vᵀ; B = U_r √(S_r / s), A = √(S_r / s) V_rᵀ; W ← W − s B A."""
    u, sigma, vh = torch.linalg.svd(linear.weight.float(), full_matrices=False)
    layer = LoRALinear.from_linear(linear, r=r, lora_alpha=lora_alpha, init_lora_weights="lora")
    root = (sigma[:r] / layer.scaling).sqrt()
    layer.lora_B.copy_(u[:, :r] * root)
    layer.lora_A.copy_(root[:, None] * vh[:r])
    residual = layer.weight.float() - layer.scaling * (layer.lora_B @ layer.lora_A)
    layer.weight.copy_(residual)
    return layer
