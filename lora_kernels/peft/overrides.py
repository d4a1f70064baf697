"""Replacements, on one model, for the methods that must handle A₀ and B₀."""

from __future__ import annotations

from typing import Any

import peft
import torch

from .layers import adapters_with_start, lora_layers, supports_start
from .patch import is_replaced, replace_method, restore_method
from .saving import load_adapter, save_pretrained
from .variant import load_from_state_dict, set_start, start_of


def install(peft_model: peft.PeftModel) -> None:
    """Replaces the model's methods. Methods that are replaced already are not changed."""
    for owner, name, function in _methods(peft_model):
        if not is_replaced(owner, name, function):
            replace_method(owner, name, function)


def uninstall(peft_model: peft.PeftModel) -> None:
    """Restores PEFT's own methods, unless an adapter still subtracts initial factors."""
    if not adapters_with_start(peft_model):
        for owner, name, function in _methods(peft_model):
            restore_method(owner, name, function)


@torch.no_grad()
def add_adapter(
    peft_model: peft.PeftModel, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any
) -> None:
    """PEFT's `add_adapter`. If `peft_config` is the very object of an adapter that subtracts A₀ and
    B₀, the new adapter has A₀ and B₀ as its factors and subtracts them too, so that at first the
    model computes what its base computes.

    TRL makes its reference model in this way ("ref" for DPO, GRPO, KTO and RLOO). TRL then copies A
    and B into it, which without A₀ and B₀ would give another model.
    """
    started = [name for name, known in peft_model.peft_config.items() if known is peft_config]
    started = [name for name in started if name in adapters_with_start(peft_model)]
    type(peft_model).add_adapter(peft_model, adapter_name, peft_config, *args, **kwargs)
    for layer in lora_layers(peft_model).values() if started else ():
        start = start_of(layer, started[0])
        if start is not None:
            layer.lora_A[adapter_name].weight.copy_(start[0])
            layer.lora_B[adapter_name].weight.copy_(start[1])
            set_start(layer, adapter_name, *start)


def add_weighted_adapter(
    lora_model: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    **kwargs: Any,
) -> None:
    """PEFT's `add_weighted_adapter`, refused where it would lose A₀ and B₀.

    PEFT combines the updates s·(BA − B₀A₀) only if `combination_type` is an SVD one and there are
    several adapters; otherwise it combines A and B themselves.

    Raises:
        ValueError: an adapter subtracts A₀ and B₀, which this combination would lose.

    """
    started = sorted(adapters_with_start(lora_model) & set(adapters))
    if started and (len(adapters) == 1 or not combination_type.endswith("svd")):
        raise ValueError(
            f"adapter {started[0]!r} subtracts a start, which combination_type="
            f"{combination_type!r} of {len(adapters)} adapter(s) would lose: use 'svd' of two or "
            "more adapters, or save the adapter and load it with plain PEFT"
        )
    type(lora_model).add_weighted_adapter(
        lora_model, adapters, weights, adapter_name, combination_type, **kwargs
    )


def _methods(peft_model: peft.PeftModel) -> list[tuple[Any, str, Any]]:
    """(owner, method name, replacement) of each replaced method."""
    return [
        (peft_model, "save_pretrained", save_pretrained),
        (peft_model, "load_adapter", load_adapter),
        (peft_model, "add_adapter", add_adapter),
        (peft_model.base_model, "add_weighted_adapter", add_weighted_adapter),
        *(
            (layer, "_load_from_state_dict", load_from_state_dict)
            for layer in lora_layers(peft_model).values()
            if supports_start(layer)
        ),
    ]
