"""Replaces a method on one object only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Replaced:
    """Calls `function(owner, ...)` in place of a method of `owner`.

    This is an object, not a bound method, so that a deep copy of the owner calls the function with
    the copy, and so that it can be pickled: a bound method is pickled by its name, and unpickling
    would give the class's own method.
    """

    def __init__(self, owner: object, function: Callable[..., Any]) -> None:
        self.owner, self.function = owner, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function with the owner as its first argument."""
        return self.function(self.owner, *args, **kwargs)


def replace_method(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Makes `owner.name(...)` call `function(owner, ...)`."""
    setattr(owner, name, Replaced(owner, function))


def is_replaced(owner: object, name: str, function: Callable[..., Any]) -> bool:
    """Whether `replace_method` has replaced `owner.name` by this function."""
    method = owner.__dict__.get(name)
    return isinstance(method, Replaced) and method.function is function


def restore_method(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Restores the class's own method, if `function` has replaced it."""
    if is_replaced(owner, name, function):
        del owner.__dict__[name]
