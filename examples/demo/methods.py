"""The three methods that the demo compares, all with this package's layers."""

from __future__ import annotations

from lora_kernels import LoRAConfig
from lora_kernels.init import PiSSA

RANK = ALPHA = 16

METHODS = {
    # A sine basis, scaled by the norm of W; no SVD.
    "LoRAM": LoRAConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="loram"),
    "LoRA (B=0)": LoRAConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights="lora"),
    # The leading singular triplets of W, from LAPACK's exact SVD.
    "PiSSA (SVD)": LoRAConfig(r=RANK, lora_alpha=ALPHA, init_lora_weights=PiSSA(method="exact")),
}
