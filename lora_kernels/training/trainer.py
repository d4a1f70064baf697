"""`accepted_by_trainer`: lets transformers' `Trainer` accept a quantized model with adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..model.lora import adapter_names

_ACCEPTED = "_hf_peft_config_loaded"


@contextmanager
def accepted_by_trainer(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which transformers' `Trainer` can be constructed for a quantized model:

    `with accepted_by_trainer(model): trainer = Trainer(model, ...)`

    The constructor accepts a quantized model only if the attribute `_hf_peft_config_loaded` says
    that the model has PEFT's adapters. The context sets the attribute only for the constructor,
    because saving a model that has it would look for PEFT's layers. Train outside of the context.

    Raises:
        ValueError: the model has no adapters, so there is nothing to train.

    """
    if not adapter_names(model):
        raise ValueError(f"this {type(model).__name__} has no adapters: add_lora first")
    had, before = _ACCEPTED in vars(model), vars(model).get(_ACCEPTED)
    setattr(model, _ACCEPTED, True)
    try:
        yield model
    finally:
        if had:
            setattr(model, _ACCEPTED, before)
        else:
            delattr(model, _ACCEPTED)
