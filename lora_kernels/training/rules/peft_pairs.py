"""The factors of PEFT's LoRA layers, without importing PEFT."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn

from ...model.install.layers import unwrapped

NO_RULE = "train this adapter without a rule"  # the end of errors
# PEFT's variants whose update is a product s·BA, by the beginning of the class's name. DoRA's
# product updates the direction, aLoRA's applies to some tokens, and Start is this package's.
_PRODUCTS = ("Dora", "_Dora", "ALora", "Start")
_Factors: TypeAlias = tuple[Tensor, Tensor]


def peft_factors(model: nn.Module) -> Iterator[tuple[str, _Factors | str, float]]:
    """(name of the layer, (A, B) or why no rule fits, s) for every active adapter of PEFT's LoRA
    layers that has a factor that trains.
    """
    module = sys.modules.get("peft.tuners.lora.layer")
    if module is None:
        return  # a model with PEFT's layers has imported PEFT
    for name, layer in unwrapped(model).named_modules():
        if not isinstance(layer, module.LoraLayer):
            continue
        for adapter in layer.active_adapters:
            factors = _factors(layer, adapter)
            if factors is not None and any(f.requires_grad for f in factors):
                reason = _why_not(layer, adapter, factors)
                yield name, reason or factors, float(layer.scaling[adapter])


def _factors(layer: Any, adapter: str) -> _Factors | None:
    """A and B of one adapter; None if the layer does not have it."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return None


def _why_not(layer: Any, adapter: str, factors: _Factors) -> str | None:
    """Why no rule is defined for this adapter; None if there may be one."""
    kind = type(layer).__name__
    if kind in ("ParamWrapper", "LoraParallelLinear"):
        return f"PEFT's {kind} keeps its factors in another layout: use add_lora, or {NO_RULE}"
    variant = type(layer.lora_variant.get(adapter)).__name__
    if variant != "NoneType" and not variant.startswith(_PRODUCTS):
        return f"the update of PEFT's {variant} is not s·BA: {NO_RULE}"
    lora_A, lora_B = factors
    if lora_B.numel() != lora_B.shape[0] * lora_A.shape[0]:
        shape = list(lora_B.shape)
        return f"its convolution has groups, and B {shape} is not one [out, r] matrix: {NO_RULE}"
    return None
