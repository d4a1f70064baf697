"""Adapters that PEFT has converted from a residual base to the original base: this package reads
them as a start and the factors that were trained from it.

PEFT writes [A; A₀] and [B, −B₀] of rank 2r. Both parts are as large as the weight and nearly
cancel, so that rounding to 16 bits loses the update. A layer that subtracts A₀ and B₀ has the same
update and is saved in a form that can be rounded.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ....layers.options import lora_scaling
from ....layers.state import LayerState
from ....model.config import AdapterState

# Two halves nearly cancel if they differ by at most this fraction of the first one.
_NEAR = 0.5


def with_starts(state: AdapterState) -> AdapterState:
    """The same adapter with half the rank and a start to subtract, if the halves of all layers
    nearly cancel; otherwise the adapter itself. s and the update of every layer do not change.
    """
    if not all(_cancels(layer) for layer in state.layers.values()):
        return state
    config = state.config
    factor = 0.5 if config.scaling_rule == "lora" else math.sqrt(0.5)
    halved = replace(
        config,
        r=max(1, config.r // 2),
        lora_alpha=None if config.lora_alpha is None else config.lora_alpha * factor,
        rank_pattern={name: max(1, r // 2) for name, r in config.rank_pattern.items()},
        alpha_pattern={name: a * factor for name, a in config.alpha_pattern.items()},
    )
    layers = {
        name: _halved(layer, layer.lora_alpha * factor, config.scaling_rule)
        for name, layer in state.layers.items()
    }
    return replace(state, config=halved, layers=layers)


@torch.no_grad()
def _cancels(layer: LayerState) -> bool:
    """Whether A = [A₁; A₂] and B = [B₁, B₂] have A₁ ≈ A₂ and B₁ ≈ −B₂, none of them zero."""
    if layer.r % 2 or layer.changes_base or layer.lora_R is not None or layer.experts is not None:
        return False
    A1, A2 = layer.lora_A.double().chunk(2)
    B1, B2 = layer.lora_B.double().chunk(2, dim=1)
    return _near(A1, A2) and _near(B1, -B2)


def _near(first: Tensor, second: Tensor) -> bool:
    size = float(first.norm())
    return size > 0 and float((first - second).norm()) <= _NEAR * size


def _halved(layer: LayerState, lora_alpha: float, rule: str) -> LayerState:
    r = layer.r // 2
    return replace(
        layer,
        lora_A=layer.lora_A[:r].clone(),
        lora_B=layer.lora_B[:, :r].clone(),
        scaling=lora_scaling(lora_alpha, r, rule),
        lora_alpha=lora_alpha,
        start_A=layer.lora_A[r:].clone(),
        start_B=-layer.lora_B[:, r:],
        residual="implicit",
    )
