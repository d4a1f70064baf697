"""transformers' Trainer over a quantised model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..model.lora import adapter_names

_ACCEPTED = "_hf_peft_config_loaded"


@contextmanager
def accepted_by_trainer(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, transformers' `Trainer` takes a quantised model with adapters:

    `with accepted_by_trainer(model): trainer = Trainer(model, ...)`

    Training itself can be outside.
    The constructor refuses quantised models but those that carry PEFT's adapters, which it tells by
    the attribute that is set here and nowhere else: with it, saving would look for PEFT's layers.

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
