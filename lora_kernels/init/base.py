"""What an initializer is, a small frozen dataclass that turns a weight into initial factors; and
the names of `init_lora_weights`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from .._utils.errors import unknown_name
from .start import Start, check_residual_fits, checked, subtract_start_


class Initializer(ABC):
    """Base of all initialisers; subclasses are frozen dataclasses whose fields are their options.

    Class attributes say what a layer has to know beforehand:

    - `changes_base`: whether s · B₀A₀ is not zero and has to be taken out of the layer, so that it
      starts as the layer it adapts.
    - `reads_weight`: whether the start depends on W's values.
    - `needs_gradient`: whether it is made from the loss gradient of W.
    - `grows_with_scaling`: whether s · B₀A₀ is of some size, and the larger the larger s is.
    - `rewrites_base`: whether the base becomes something else than W − s · B₀A₀, so that it has to
      be rewritten for the start to make sense.
    """

    changes_base: bool
    rewrites_base: bool = False
    reads_weight: bool = False
    needs_gradient: bool = False

    @property
    def grows_with_scaling(self) -> bool:
        """What holds of a start that is neither zero nor divided by s."""
        return self.changes_base

    @abstractmethod
    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start for `weight` [out, in], which is only read.

        `scaling` is the layer's s, for starts that are divided by it; `gradient` [out, in] that of
        the loss, for starts that are made from it.
        """

    def starts(
        self,
        weights: Sequence[Tensor],
        r: int,
        scaling: float = 1.0,
        gradients: Sequence[Tensor] | None = None,
    ) -> list[Start]:
        """The starts of several weights of one shape, dtype and device, which are only read.

        The same as one by one; overridden where they are made faster together.
        """
        each = [None] * len(weights) if gradients is None else gradients
        return [self(w, r, scaling, g) for w, g in zip(weights, each, strict=True)]

    def absorb_(
        self, weight: Tensor, r: int, scaling: float, gradient: Tensor | None = None
    ) -> Start:
        """The start, with weight ← weight − scaling · B₀A₀ in place if that is not zero.

        Raises:
            ValueError: if W holds NaN or Inf, or has no room for the residual, beside what the call
                raises. Nothing is written then.

        """
        start = checked(self(weight, r, scaling, gradient), weight, r)
        if self.changes_base:
            check_residual_fits(weight, start, scaling)
            self.take_out_(weight, start, scaling)
        return start

    def take_out_(self, weight: Tensor, start: Start, scaling: float) -> None:
        """Makes the base that goes with a start of `weight`, in place: weight − scaling · B₀A₀."""
        subtract_start_(weight, start, scaling)


def refuse_implicit(initializer: Initializer, residual: str) -> None:
    """Raises if the start needs a base that it rewrites, and that is to stay as it is."""
    if initializer.rewrites_base and residual != "absorb":
        raise ValueError(
            f"the start of {type(initializer).__name__} goes with a base that it rewrites, to "
            "quantised values: it needs a float weight of its own and residual='absorb'"
        )


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
