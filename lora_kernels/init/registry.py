"""The names of `init_lora_weights`."""

from __future__ import annotations

from collections.abc import Callable

from .._errors import unknown_name
from .base import Initializer

_REGISTRY: dict[str, Callable[[], Initializer]] = {}


def register_initializer(name: str, factory: Callable[[], Initializer]) -> None:
    """Makes `init_lora_weights=name` (in any case) mean `factory()`; a name can be taken once.

    Raises:
        ValueError: the name is taken.
        TypeError: `name` is no string, or `factory` an object in place of its class.

    """
    if not isinstance(name, str):
        raise TypeError(f"the name of an initialiser must be a string, got {type(name).__name__}")
    if isinstance(factory, Initializer) or not callable(factory):
        raise TypeError(
            f"{name!r} needs a class or a function that makes an Initializer, got an object of "
            f"{type(factory).__name__}"
        )
    key = name.lower()
    if key in _REGISTRY:
        raise ValueError(f"the initialiser name {key!r} is taken")
    _REGISTRY[key] = factory


def initializer_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


def get_initializer(init_lora_weights: str | Initializer) -> Initializer:
    """The initialiser of that name with its default options, or the object itself."""
    if isinstance(init_lora_weights, Initializer):
        return init_lora_weights
    if isinstance(init_lora_weights, type) and issubclass(init_lora_weights, Initializer):
        name = init_lora_weights.__name__
        raise TypeError(f"init_lora_weights is the class {name}: make an object of it, {name}()")
    if not isinstance(init_lora_weights, str):
        raise TypeError(
            "init_lora_weights must be a name or an Initializer, got "
            f"{type(init_lora_weights).__name__}; names: {', '.join(initializer_names())}"
        )
    factory = _REGISTRY.get(init_lora_weights.lower())
    if factory is None:
        raise unknown_name("init_lora_weights", init_lora_weights, initializer_names())
    return factory()
