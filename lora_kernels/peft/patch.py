"""A method replaced on one object only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Replaced:
    """`function(owner, ...)` in place of a method of `owner`.

    An object and not a bound method: a copy's replacement belongs to the copy, and it pickles (a
    bound method is pickled by its name, which would give the class's own back).
    """

    def __init__(self, owner: object, function: Callable[..., Any]) -> None:
        self.owner, self.function = owner, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        return self.function(self.owner, *args, **kwargs)


def replace_method(owner: object, name: str, function: Callable[..., Any]) -> None:
    """`owner.name(...)` is `function(owner, ...)` from now on."""
    setattr(owner, name, Replaced(owner, function))


def is_replaced(owner: object, name: str, function: Callable[..., Any]) -> bool:
    """Whether `owner.name` is that function, by `replace_method`."""
    method = owner.__dict__.get(name)
    return isinstance(method, Replaced) and method.function is function


def restore_method(owner: object, name: str, function: Callable[..., Any]) -> None:
    """Takes the function away if it is there: the class's own method again."""
    if is_replaced(owner, name, function):
        del owner.__dict__[name]
