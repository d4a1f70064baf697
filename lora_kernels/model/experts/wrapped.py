"""The forwards that transformers' tensor and expert parallelism set on the experts' modules.

Such a forward is an attribute of the module. It moves the tokens, makes the module hold its local
parameters, and calls the forward of the module's class, which it has stored. When the module gets
another class, the stored forward is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

_PACKAGE = "transformers.distributed"
_KEPT = "experts_forward"  # the attribute of transformers' `EPImplementation`
Put = Callable[[MethodType], None]


def has_parallel_forward(experts: nn.Module) -> bool:
    """Whether the module has a forward of transformers' parallelism, which calls its class's."""
    forward = vars(experts).get("forward")
    is_known = str(getattr(forward, "__module__", "")).startswith(_PACKAGE)
    return is_known and next(_kept(experts), None) is not None


def use_own_forward(experts: nn.Module) -> None:
    """Makes such a forward call the forward of the class that the module has now."""
    cls: Any = type(experts)
    for put in list(_kept(experts)):
        put(MethodType(cls.forward, experts))


def _kept(experts: nn.Module) -> Iterator[Put]:
    """For each place where the forward has stored the class's one, a function that replaces it."""
    # accelerate's hook stores the module's forward, whatever it is, under another name.
    waiting: list[Any] = [vars(experts).get(name) for name in ("forward", "_old_forward")]
    seen: set[int] = set()
    while waiting:
        holder = waiting.pop()
        if holder is None or id(holder) in seen:
            continue
        seen.add(id(holder))
        for value, put in _contents(holder):
            if getattr(value, "__self__", None) is experts:
                yield put
            elif isinstance(value, FunctionType) or hasattr(value, _KEPT):
                waiting.append(value)


def _contents(holder: Any) -> Iterator[tuple[Any, Put]]:
    """What a function has in its closure, or an object in its attributes."""
    if isinstance(holder, FunctionType):
        for cell in holder.__closure__ or ():
            yield cell.cell_contents, partial(setattr, cell, "cell_contents")
    elif hasattr(holder, _KEPT):
        for name, value in list(vars(holder).items()):
            yield value, partial(setattr, holder, name)
