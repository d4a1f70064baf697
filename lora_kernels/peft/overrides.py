"""Replacements, on one model, for the methods that must handle A₀ and B₀.

Other packages may install kernels that replace the layers after `initialize`. The model therefore
looks for such kernels before its first forward, before the first forward after an adapter was
loaded, added or unmerged, when it is put into training mode, and when it is saved. Looking at every
forward would cost too much.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import peft
import torch
from torch import nn

from .files import saving
from .foreign_kernels import explained, without_start
from .layers import adapters_with_start, lora_layers, supports_start
from .patch import is_replaced, replace_method, restore_method
from .variant import (
    factors_of,
    load_from_state_dict,
    measure_magnitude,
    set_start,
    start_of,
)


def install(peft_model: peft.PeftModel) -> None:
    """Replaces the model's methods, except those that are replaced already."""
    for owner, name, function in _methods(peft_model):
        if not is_replaced(owner, name, function):
            replace_method(owner, name, function)
    _look_at_next_forward(peft_model.get_base_model())


def uninstall(peft_model: peft.PeftModel) -> None:
    """Restores PEFT's own methods, unless an adapter still subtracts initial factors."""
    if not adapters_with_start(peft_model):
        for owner, name, function in _methods(peft_model):
            restore_method(owner, name, function)
        _forget(peft_model.get_base_model())


def train(peft_model: peft.PeftModel, mode: bool = True) -> peft.PeftModel:
    """`nn.Module.train`, which first looks for other packages' kernels if the mode changes to
    training.

    Raises:
        RuntimeError: such kernels compute layers that should subtract B₀A₀.

    """
    if mode and not peft_model.training:
        _refuse_kernels(peft_model)
    type(peft_model).train(peft_model, mode)
    return peft_model


def save_pretrained(
    peft_model: peft.PeftModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    """`saving.save_pretrained`; warns if other packages' kernels ignore what the file subtracts."""
    kernels = without_start(peft_model)
    if kernels:
        warnings.warn(
            "the saved adapter subtracts s·B₀A₀, as its layers do, but the model did not if it was "
            f"trained as it is now: {explained(kernels)}",
            stacklevel=3,
        )
    saving.save_pretrained(peft_model, save_directory, *args, **kwargs)


def load_adapter(
    peft_model: peft.PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`saving.load_adapter`; the loaded adapter may be the model's first that subtracts B₀A₀."""
    loaded = saving.load_adapter(peft_model, model_id, adapter_name, *args, **kwargs)
    _look_at_next_forward(peft_model.get_base_model())
    return loaded


@torch.no_grad()
def add_adapter(
    peft_model: peft.PeftModel, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any
) -> None:
    """PEFT's `add_adapter`. If `peft_config` is the same object as the configuration of an adapter
    that subtracts A₀ and B₀, the new adapter gets A₀ and B₀ as its factors and subtracts them too,
    so that the model first computes what its base computes.

    TRL makes its reference model in this way ("ref" for DPO, GRPO, KTO and RLOO) and then copies A
    and B into it. Without A₀ and B₀, that would be another model.
    """
    started = [name for name, known in peft_model.peft_config.items() if known is peft_config]
    started = [name for name in started if name in adapters_with_start(peft_model)]
    type(peft_model).add_adapter(peft_model, adapter_name, peft_config, *args, **kwargs)
    for layer in lora_layers(peft_model).values() if started else ():
        start = start_of(layer, started[0])
        if start is not None:
            for factor, initial in zip(factors_of(layer, adapter_name), start, strict=True):
                factor.copy_(initial)
            set_start(layer, adapter_name, *start)
            measure_magnitude(layer, adapter_name)
    _look_at_next_forward(peft_model.get_base_model())


def add_weighted_adapter(
    lora_model: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    **kwargs: Any,
) -> None:
    """PEFT's `add_weighted_adapter`; raises an error where it would lose A₀ and B₀.

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


def _refuse_kernels(model: nn.Module) -> None:
    kernels = without_start(model)
    if kernels:
        raise RuntimeError(f"since the model was initialized, {explained(kernels)}")


def _look_before_forward(model: nn.Module, args: Any) -> None:
    """A hook of the model inside the `PeftModel`; `generate` calls it too. It removes itself."""
    if torch.compiler.is_compiling():
        return
    if not any(layer.merged for layer in lora_layers(model).values()):
        _refuse_kernels(model)  # while layers are merged, kernels that read the weight are right
    _forget(model)


def _look_at_next_forward(model: nn.Module) -> None:
    """Makes the model look for kernels at its next forward. `model` is inside the `PeftModel`."""
    _forget(model)
    model.register_forward_pre_hook(_look_before_forward)


def _forget(model: nn.Module) -> None:
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _look_before_forward]:
        hooks.pop(key, None)


def unmerge_adapter(lora_model: Any, *args: Any, **kwargs: Any) -> None:
    """PEFT's `unmerge_adapter`, after which the layers subtract B₀A₀ themselves again."""
    type(lora_model).unmerge_adapter(lora_model, *args, **kwargs)
    _look_at_next_forward(lora_model.model)


def _methods(peft_model: peft.PeftModel) -> list[tuple[Any, str, Any]]:
    """(owner, method name, replacement) of each replaced method."""
    return [
        (peft_model, "train", train),
        (peft_model, "save_pretrained", save_pretrained),
        (peft_model, "load_adapter", load_adapter),
        (peft_model, "add_adapter", add_adapter),
        (peft_model.base_model, "add_weighted_adapter", add_weighted_adapter),
        (peft_model.base_model, "unmerge_adapter", unmerge_adapter),
        *(
            (layer, "_load_from_state_dict", load_from_state_dict)
            for layer in lora_layers(peft_model).values()
            if supports_start(layer)
        ),
    ]
