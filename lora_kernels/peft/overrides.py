"""The methods of PEFT that have to know of starts, replaced on one model."""

from __future__ import annotations

from typing import Any

import peft
import torch

from .layers import adapters_with_start, lora_layers
from .patch import is_replaced, replace_method, restore_method
from .saving import load_adapter, save_pretrained
from .variant import set_start, start_of


def install(peft_model: peft.PeftModel) -> None:
    """Puts these in place of the model's own."""
    for owner, name, function in _methods(peft_model):
        if not is_replaced(owner, name, function):
            replace_method(owner, name, function)


def uninstall(peft_model: peft.PeftModel) -> None:
    """PEFT's own methods again, unless an adapter still has a start."""
    if not adapters_with_start(peft_model):
        for owner, name, function in _methods(peft_model):
            restore_method(owner, name, function)


@torch.no_grad()
def add_adapter(
    peft_model: peft.PeftModel, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any
) -> None:
    """PEFT's `add_adapter`. If the configuration is the very object of an adapter that subtracts a
    start, the new one has that start too, and is the base as a new adapter should be.

    TRL makes its reference model so ("ref" for DPO, GRPO, KTO and RLOO): it then copies A and B,
    and without their start these would be another model.
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
    """PEFT's, where it combines s·(BA − B₀A₀): by SVD and of more than one adapter. Its other ways
    combine A and B themselves.

    Raises:
        ValueError: another way, and one of the adapters subtracts a start.

    """
    started = sorted(adapters_with_start(lora_model) & set(adapters))
    if started and (len(adapters) == 1 or not combination_type.endswith("svd")):
        raise ValueError(
            f"adapter {started[0]!r} subtracts a start, which combination_type="
            f"{combination_type!r} of {len(adapters)} adapter(s) would lose: take 'svd' of two or "
            "more, or save it and load it with plain PEFT"
        )
    type(lora_model).add_weighted_adapter(
        lora_model, adapters, weights, adapter_name, combination_type, **kwargs
    )


def _methods(peft_model: peft.PeftModel) -> list[tuple[Any, str, Any]]:
    """(owner, name, what replaces it)."""
    return [
        (peft_model, "save_pretrained", save_pretrained),
        (peft_model, "load_adapter", load_adapter),
        (peft_model, "add_adapter", add_adapter),
        (peft_model.base_model, "add_weighted_adapter", add_weighted_adapter),
    ]
