"""Scaling rules: the multiplier s of s · B A from `lora_alpha` and r."""

from __future__ import annotations

import math
from numbers import Real


def lora_scaling(lora_alpha: float, r: int, use_rslora: bool = False) -> float:
    """α / r (LoRA, arXiv 2106.09685), or α / √r with `use_rslora` (arXiv 2312.03732)."""
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, Real):
        raise TypeError(f"lora_alpha must be a number, got {type(lora_alpha).__name__}")
    if not 0 < lora_alpha < math.inf:
        raise ValueError(f"lora_alpha must be positive and finite, got {lora_alpha}")
    return float(lora_alpha) / (math.sqrt(r) if use_rslora else r)
