"""What `adapters_per_row` has to know about a module, and how it intercepts the module's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ....layers.adapted import AdaptedLayer
from ...experts.module import stacks_of

IMPL = "_compiled_call_impl"  # what torch calls in place of a module's hooks and forward


class Taken:
    """The attribute of a module that torch calls in place of its hooks and forward. Copies of the
    module, including pickled copies, do not have it.
    """

    def __init__(self, module: nn.Module, taken: Callable[..., Any]) -> None:
        self._own, self._taken = vars(module), taken
        self._former = self._own.get(IMPL)

    def put(self) -> None:
        """Starts to intercept the module's calls."""
        self._own[IMPL] = self._taken

    def remove(self) -> None:
        """Stops intercepting the calls, unless other code has replaced the attribute."""
        if self._own.get(IMPL) is not self._taken:
            return
        if self._former is None:
            del self._own[IMPL]
        else:
            self._own[IMPL] = self._former


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` has made the module, or compiled it in place."""
    return hasattr(module, "_orig_mod") or IMPL in vars(module)


def has_adapters(module: nn.Module) -> bool:
    """Whether the module itself has adapters, for one of its parameters or for all."""
    return isinstance(module, AdaptedLayer) or bool(stacks_of(module))


def is_batch_first(module: nn.Module) -> bool:
    """False for torch's attention, transformers and RNNs whose rows are in dimension 1."""
    attention = getattr(module, "self_attn", None)
    return getattr(module, "batch_first", getattr(attention, "batch_first", True)) is not False
