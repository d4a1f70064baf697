"""Replaces a method on a single object, and tells whether a module is as its class made it."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_REPLICATE = "_replicate_for_data_parallel"


class Replaced:
    """Calls `function(owner, ...)` in place of a method of `owner`.

    This is an object, not a bound method, so that it can be pickled: a bound method is pickled by
    its name, and unpickling would give the class's own method. Copies of the owner, made by `copy`,
    `pickle` or `nn.DataParallel`, get a `Replaced` of their own that calls the function with the
    copy.
    """

    def __init__(self, owner: object, function: Callable[..., Any]) -> None:
        self.owner, self.function = owner, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function with the owner as its first argument."""
        return self.function(self.owner, *args, **kwargs)


def replace_method(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Makes `owner.name(...)` call `function(owner, ...)`."""
    setattr(owner, name, Replaced(owner, function))
    # `copy` and `pickle` find a function like `_reduced` only by the class.
    copyreg.dispatch_table.setdefault(type(owner), _reduced)
    if isinstance(owner, nn.Module):
        vars(owner)[_REPLICATE] = Replaced(owner, _replica)


def is_replaced(owner: object, name: str, function: Callable[..., Any]) -> bool:
    """Whether `replace_method` has replaced `owner.name` with this function."""
    method = owner.__dict__.get(name)
    return isinstance(method, Replaced) and method.function is function


def restore_method(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Restores the class's own method, if `function` has replaced it."""
    if is_replaced(owner, name, function):
        del owner.__dict__[name]
        if _functions(owner, vars(owner)).keys() == {_REPLICATE}:
            del owner.__dict__[_REPLICATE]


def is_plain(module: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether the module is exactly a `kind`, without hooks or a replaced forward."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _functions(owner: object, attributes: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """{attribute: function} of the attributes that call a function with this owner."""
    return {
        name: value.function
        for name, value in attributes.items()
        if isinstance(value, Replaced) and value.owner is owner
    }


def _replica(owner: nn.Module) -> nn.Module:
    """A copy for `nn.DataParallel`, which puts parameters of another device into it."""
    replica = type(owner)._replicate_for_data_parallel(owner)
    for name, function in _functions(owner, vars(replica)).items():
        vars(replica)[name] = Replaced(replica, function)
    return replica


def _reduced(owner: object) -> tuple[Any, ...]:
    """How `copy` and `pickle` copy the owner."""
    made: tuple[Any, ...] = tuple(owner.__reduce_ex__(2))
    state = made[2] if len(made) > 2 and isinstance(made[2], dict) else {}
    functions = _functions(owner, state)
    if not functions:
        return made
    kept = {name: value for name, value in state.items() if name not in functions}
    return _copied, (type(owner), functions), kept


def _copied(cls: type[Any], functions: Mapping[str, Callable[..., Any]]) -> object:
    """An object that has no attributes except the replaced methods."""
    copied = object.__new__(cls)
    for name, function in functions.items():
        copied.__dict__[name] = Replaced(copied, function)
    return copied
