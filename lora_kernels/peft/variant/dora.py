"""The start of PEFT's DoRA layers: y = (m ⊘ ‖V‖) ∘ x Vᵀ + b, where V = W + s·(BA − B₀A₀) and ‖V‖
are the norms of V's rows, which the backward treats as constants.

PEFT's own DoRA variants merge by `get_delta_weight`, which `set_start` replaces; the variants here
inherit their merging.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from torch import Tensor, nn
from torch.nn.functional import linear

from ...ops.linear.factors import product_factors
from ...ops.linear.row_norms import row_gain
from .parts import factors_of, magnitude_of, matrix_of, start_of


class DoraStartVariant(DoraLinearVariant):
    """How PEFT computes a DoRA adapter that subtracts s·B₀A₀."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """y [..., out] from `result` [..., out], the base's output with its bias.

        While A = A₀ and B = B₀, m = ‖V‖ and dropout is inactive, y is exactly `result`. With active
        dropout, PEFT computes x W'ᵀ + (g − 1) ∘ drop(x) W'ᵀ + g ∘ s·drop(x) AᵀBᵀ + b with
        g = m ⊘ ‖V‖ and the base W', which is W − s·B₀A₀ here.
        """
        gain, base = _gain(module, active_adapter), module.get_base_layer()
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        start_A, start_B = module.lora_start_A[active_adapter], module.lora_start_B[active_adapter]
        scaling, dropout = module.scaling[active_adapter], module.lora_dropout[active_adapter]
        own = x if isinstance(dropout, nn.Identity) or not module.training else dropout(x)
        adapter = lora_B(lora_A(own))  # [..., out]
        start = linear(linear(own, start_A), start_B)
        if own is x:
            product = result if base.bias is None else result - base.bias  # [..., out]
            return result + (gain - 1) * product + gain * (adapter - start) * scaling
        product = linear(own, matrix_of(module).to(own.dtype)) - start * scaling
        change = adapter - linear(linear(x, start_A), start_B)  # no dropout, as for the base
        return result + change * scaling + (gain - 1) * (product + adapter * scaling)


class DoraEmbeddingStartVariant(DoraEmbeddingVariant):
    """`DoraStartVariant` for an embedding, where PEFT applies no dropout."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """y [..., D] for the tokens x, from `result` [..., D]: the base's output, multiplied by the
        layer's `embed_scale` if it has one.
        """
        gain = _gain(module, active_adapter)
        lora_A, lora_B = factors_of(module, active_adapter)
        start_A, start_B = module.lora_start_A[active_adapter], module.lora_start_B[active_adapter]
        adapter = module._embed(x, lora_A.T) @ lora_B.T  # [..., D]
        start = module._embed(x, start_A.T) @ start_B.T
        update, scale = (
            (adapter - start) * module.scaling[active_adapter],
            module._get_embed_scale(),
        )
        update = update if scale is None else update * scale.to(update.dtype)
        return gain * (result + update)


def _gain(layer: LoraLayer, adapter: str) -> Tensor:
    """m ⊘ ‖V‖ [out], with the gradient of m."""
    magnitude = magnitude_of(layer, adapter)
    if magnitude is None:
        raise RuntimeError(f"adapter {adapter!r} has a start of DoRA, but no magnitudes")
    return row_gain(magnitude, _row_norms(layer, adapter))


@torch.no_grad()
def _row_norms(layer: LoraLayer, adapter: str) -> Tensor:
    """‖V‖ [out] of the rows of V = W + s·(BA − B₀A₀), in float32 or wider."""
    start_A, start_B = start_of(layer, adapter) or (None, None)
    right, left = product_factors(*factors_of(layer, adapter), None, start_A, start_B)
    scaling = layer.scaling[adapter]
    if isinstance(scaling, Tensor):  # PEFT's hot-swapping, for compiled models
        left, scaling = left * scaling, 1.0
    norms: Tensor = torch.ops.lora.row_norms(matrix_of(layer), right, left, scaling)
    return norms


@torch.no_grad()
def measure_magnitude(layer: LoraLayer, adapter: str) -> None:
    """Sets a DoRA adapter's magnitudes to the norms of V, in place; other adapters have none."""
    magnitude = magnitude_of(layer, adapter)
    if magnitude is not None:
        magnitude.copy_(_row_norms(layer, adapter))
