"""What PEFT does today, for tests that compare with it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn


def holds(fact: bool, what: str) -> None:
    """Fail if PEFT no longer does what the test says it does."""
    if not fact:
        import peft

        pytest.fail(f"PEFT {peft.__version__} has changed, for the better perhaps: not {what}")


@contextmanager
def peft_raises(error: type[Exception], message: str) -> Iterator[None]:
    """Fail unless PEFT raises this error."""
    what = f"{error.__name__}({message!r}) any more"
    try:
        yield
    except Exception as raised:
        holds(isinstance(raised, error) and re.search(message, str(raised)) is not None, what)
    else:
        holds(False, what)


def peft_model(model: nn.Module, init: str | bool, seed: int = 2, **options) -> nn.Module:
    """The model with PEFT's adapter and s = 1."""
    import peft

    r = options.pop("r", 4)
    options = {"r": r, "lora_alpha": r, "target_modules": "all-linear", **options}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(init_lora_weights=init, **options)
        return peft.get_peft_model(model, config).eval()


def loaded_by_peft(model: nn.Module, folder, seed: int = 3) -> nn.Module:
    import peft

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()
