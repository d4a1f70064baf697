"""`Initializer`, which turns a weight into initial factors, and the registry of the names that
`init_lora_weights` accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._utils.errors import unknown_name
from .sharded.layout import ADAPT_MODEL, is_sharded
from .start import (
    Start,
    StartRequest,
    check_residual_fits,
    checked,
    subtract_start_,
    subtract_starts_,
)


class LayerRank(NamedTuple):
    """The rank of a layer, and the factor by which its `lora_alpha` changes with that rank."""

    r: int
    alpha_factor: float = 1.0


class Initializer:
    """Base class of all initializers; subclasses are frozen dataclasses whose fields are options.

    A subclass defines `make_start`. It may override `make_starts` if a batch is faster than one
    start after another, and `absorb_` and `take_out_` if its base is not W − s · B₀A₀. A subclass
    that overrides `__call__` instead of `make_start` works too.

    Class attributes tell a layer in advance what to expect:

    - `changes_base`: s · B₀A₀ is not zero and has to be subtracted from the base, so that the layer
      starts as the layer it adapts.
    - `reads_weight`: the start depends on W's values.
    - `needs_gradient`: the start is computed from the loss gradient of W.
    - `needs_activations`: the start is computed from statistics of the layer's input.
    - `grows_with_scaling`: s · B₀A₀ is not zero and grows with s.
    - `rewrites_base`: the start needs a base with new values other than W − s · B₀A₀; the base has
      to be writable.
    - `has_recipe`: the start's A and B can be recomputed from its β.
    - `has_R`: the start has an R.
    - `has_diag`: the start has a λ.
    - `compensates`: the start compensates for a base's quantization error. For a base that is
      already quantized, `toward(original)` computes it from the weight before quantization.
    - `trains`: which of A and B train, "AB" or "A". If the start has an R, only R trains.
    """

    changes_base: bool
    rewrites_base: bool = False
    reads_weight: bool = False
    needs_gradient: bool = False
    needs_activations: bool = False
    has_recipe: bool = False
    has_R: bool = False
    has_diag: bool = False
    compensates: bool = False
    trains: str = "AB"

    @property
    def grows_with_scaling(self) -> bool:
        """True by default for every start that changes the base. Override it if B₀A₀ is divided by
        s, or if the base does not change although B₀A₀ is not zero.
        """
        return self.changes_base

    @property
    def reads_entries(self) -> bool:
        """Whether the start needs entries of W or of its gradient, not only sums over W. One
        process then gathers the whole of a sharded W. True by default for every start that reads W
        or needs a gradient.
        """
        return self.reads_weight or self.needs_gradient

    @property
    def draws_unseeded(self) -> bool | None:
        """Whether the start draws from torch's global generator, which processes do not share; None
        if unknown, as for a start without a `seed`.
        """
        return self.seed is None if hasattr(self, "seed") else None

    def make_start(self, request: StartRequest) -> Start:
        """The start for one weight, which is only read."""
        raise NotImplementedError(
            f"{type(self).__name__} must define make_start(self, request) -> Start"
        )

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        """The starts for weights of one shape, dtype and device, with one r and one scaling.

        By default one after the other. An override must return the same starts.
        """
        if type(self).__call__ is Initializer.__call__:
            return [self.make_start(request) for request in requests]
        return [self(q.weight, q.r, q.scaling, q.gradient) for q in requests]

    def __call__(
        self,
        weight: Tensor,
        r: int,
        scaling: float = 1.0,
        gradient: Tensor | None = None,
        activations: Any = None,
    ) -> Start:
        """`make_start` for these arguments, which `StartRequest` explains.

        Raises:
            TypeError: the weight is sharded. Whatever the start itself raises is passed on.

        """
        refuse_sharded(weight)
        request = StartRequest(weight, r, scaling, gradient, activations=activations)
        return self.make_start(request)

    def starts(
        self,
        weights: Sequence[Tensor],
        r: int,
        scaling: float = 1.0,
        gradients: Sequence[Tensor | None] | None = None,
        sums: Sequence[Tensor | None] | None = None,
        activations: Sequence[Any] | None = None,
    ) -> list[Start]:
        """`make_starts` for several weights of one shape, dtype and device.

        Raises:
            TypeError: a weight is sharded. Whatever a start itself raises is passed on.

        """
        refuse_sharded(*weights)
        none = [None] * len(weights)
        each = zip(weights, gradients or none, sums or none, activations or none, strict=True)
        return self.make_starts([StartRequest(w, r, scaling, g, s, x) for w, g, s, x in each])

    def layer_ranks(self, requests: Mapping[str, StartRequest]) -> dict[str, LayerRank] | None:
        """The ranks by layer name that this start chooses in place of the requested ones; None (the
        default) keeps the requested ranks. The requests' weights have shapes, but no values. Layers
        of rank 0 are not adapted.
        """
        return None

    def absorb_(
        self,
        weight: Tensor,
        r: int,
        scaling: float,
        gradient: Tensor | None = None,
        activations: Any = None,
    ) -> Start:
        """The start. If s · B₀A₀ is not zero, it is subtracted: weight ← weight − scaling · B₀A₀ in
        place.

        Raises:
            ValueError: W holds NaN or Inf, or the residual could overflow. Whatever the start
                itself raises is passed on. Nothing is written in these cases.
            TypeError: the weight is sharded.

        """
        refuse_sharded(weight)
        measured = () if activations is None else (activations,)
        start = checked(self(weight, r, scaling, gradient, *measured), weight, r)
        if self.changes_base:
            check_residual_fits(weight, start, scaling)
            self.take_out_(weight, start, scaling)
        return start

    def toward(self, original: Callable[[], Tensor]) -> Initializer:
        """The initializer for a base that is already quantized; `original()` returns the weight W
        [out, in] before quantization. Only initializers with `compensates` have one.
        """
        raise TypeError(f"{type(self).__name__} does not use the weight before quantization")

    def for_embedding(self) -> Initializer:
        """The initializer that embeddings get instead; by default this one."""
        return self

    def take_out_(self, weight: Tensor, start: Start, scaling: float) -> None:
        """Rewrite `weight` in place as the base of its start: weight − scaling · B₀A₀."""
        subtract_start_(weight, start, scaling)

    @property
    def subtracts(self) -> bool:
        """Whether `take_out_` only subtracts s·B₀A₀."""
        return type(self).take_out_ is Initializer.take_out_

    def take_out_each_(self, weights: Sequence[Tensor], start: Start, scaling: float) -> None:
        """`take_out_` for experts, whose starts are one `Start.stacked`."""
        if self.subtracts:
            subtract_starts_(weights, start, scaling)
        else:
            for e, weight in enumerate(weights):
                self.take_out_(weight, start.expert(e), scaling)


def refuse_sharded(*weights: Tensor) -> None:
    """Raise if a weight is sharded: the start of a part is not the start of the whole."""
    if any(map(is_sharded, weights)):
        raise TypeError(f"the weight is sharded: {ADAPT_MODEL}")


def refuse_implicit(initializer: Initializer, residual: str) -> None:
    """Raise if the initializer rewrites the base but `residual` leaves the base unchanged."""
    if initializer.rewrites_base and residual != "absorb":
        raise ValueError(
            f"the start of {type(initializer).__name__} goes with a base that it rewrites, to "
            "quantized values: it needs a float weight of its own and residual='absorb'"
        )


_REGISTRY: dict[str, Callable[[], Initializer]] = {}


def register_initializer(name: str, factory: Callable[[], Initializer]) -> None:
    """Let `init_lora_weights=name`, in upper or lower case, stand for `factory()`.

    Raises:
        ValueError: the name is taken.
        TypeError: `name` is not a string, or `factory` is an object instead of its class.

    """
    if not isinstance(name, str):
        raise TypeError(f"the name of an initializer must be a string, got {type(name).__name__}")
    if isinstance(factory, Initializer) or not callable(factory):
        raise TypeError(
            f"{name!r} needs a class or a function that makes an Initializer, got an object of "
            f"{type(factory).__name__}"
        )
    key = name.lower()
    if key in _REGISTRY:
        raise ValueError(f"the initializer name {key!r} is taken")
    _REGISTRY[key] = factory


def initializer_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_REGISTRY)


def get_initializer(init_lora_weights: str | Initializer) -> Initializer:
    """The initializer of that name with its default options, or the object itself."""
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
