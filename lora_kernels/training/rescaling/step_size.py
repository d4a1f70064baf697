"""κ, the step size of a start: how far one step of Adam at the rate 1 moves W.

It is the root mean square of the entries of the change of W (`adam_growth`), over a whole model.
A step moves A and B too, and so κ: little, if the rate is small beside their entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...init import Initializer, Start
from ...init.fused import Parts, blocks
from ..magnitude import adam_growth

LAYERS = 4  # layers of each kind on which a slow start is computed, by default


@dataclass(frozen=True)
class LayerSize:
    """An adapted layer: `shape` is (out, in) of W, or of one expert; `entries` is the number of
    entries of W that an adapter moves, of all experts together.
    """

    name: str
    shape: tuple[int, int]
    r: int
    scaling: float
    entries: int

    @property
    def kind(self) -> tuple[object, ...]:
        """A key that is equal for layers that differ only in the numbers of their blocks."""
        words = tuple(part for part in self.name.split(".") if not part.isdecimal())
        return words, self.shape, self.r, self.scaling


@dataclass(frozen=True)
class StepSize:
    """κ of a model with `layers` adapted layers, `measured` of which were measured. `scaling` is
    the smallest and the largest s, `ranks` the smallest and the largest r. A step at the rate η
    adds `growth` · η² to κ².
    """

    value: float
    measured: int
    layers: int
    scaling: tuple[float, float]
    ranks: tuple[int, int]
    growth: float = 0.0

    @classmethod
    def of(
        cls, layers: Sequence[LayerSize], squares: Mapping[str, float], moving: float = 0.0
    ) -> StepSize:
        """κ² = Σ κ²_l entries_l / Σ entries_l, from κ² of layers by name.

        A layer that was not measured gets the mean of its kind. At least one layer of each kind
        must be measured. The function `moving` computes the argument `moving` from the start.

        Raises:
            ValueError: κ is zero or not finite.

        """
        total = 0.0
        for own in _kinds(layers).values():
            found = [squares[layer.name] for layer in own if layer.name in squares]
            total += sum(layer.entries for layer in own) * sum(found) / len(found)
        entries = sum(layer.entries for layer in layers)
        value = math.sqrt(total / entries)
        if not 0 < value < math.inf:
            raise ValueError(
                f"the step size of this start is {value:g}: its factors are zero or too large in "
                "every layer, and no learning rate follows from it"
            )
        scalings, ranks = [own.scaling for own in layers], [own.r for own in layers]
        return cls(
            value,
            len(squares),
            len(layers),
            (min(scalings), max(scalings)),
            (min(ranks), max(ranks)),
            moving * sum(own.entries * own.r * own.scaling**2 for own in layers) / entries,
        )

    def after(self, rate: float) -> float:
        """κ after the first step at this rate."""
        return math.sqrt(self.value**2 + self.growth * rate**2)

    def product(self, rate: float) -> float:
        """c = η · κ of the rate η, for the κ after the first step."""
        return rate * self.after(rate)

    def rate(self, product: float) -> float:
        """The rate whose `product` this is."""
        square = self.value**2
        root = math.hypot(square, 2 * math.sqrt(self.growth) * product)
        return product * math.sqrt(2 / (square + root))


def is_slow(initializer: Initializer) -> bool:
    """Whether the start is computed from the entries of W or from data, for example by an SVD."""
    from_data = initializer.needs_gradient or initializer.needs_activations
    return initializer.reads_entries or from_data


def moving(initializer: Initializer, ratio: float) -> float:
    """What a step of rate η adds to κ², over s²rη²: the entries of A move by η and those of B by
    `ratio` · η, with signs that do not depend on their own. With a factor frozen, κ stays. KaSA's λ
    has a mean square of 1.
    """
    return 0.0 if initializer.has_R or initializer.trains != "AB" else 2 * ratio**2


def sampled(layers: Sequence[LayerSize], limit: int | None) -> list[LayerSize]:
    """At most `limit` layers of each kind, evenly spaced; all of them if None."""
    found = []
    for own in _kinds(layers).values():
        count = len(own) if limit is None else min(limit, len(own))
        # The middles of `count` equal parts.
        found += [own[(2 * k + 1) * len(own) // (2 * count)] for k in range(count)]
    return found


def start_square(
    start: Start, scaling: float, *, trains: str = "AB", ratio: float = 1.0, parts: Parts = ()
) -> float:
    """κ² = s² · `adam_growth` of one layer's start, with s = `scaling`.

    For experts [E, ...] it is their mean. For a fused layer it is the mean of its `parts`, weighted
    by their rows, because the zeros of B outside the parts' blocks do not train. `trains` and
    `ratio` are those of `adam_growth`.
    """
    if start.lora_A.dim() == 3:
        experts = range(len(start.lora_A))
        each = [_growth(start.expert(e), trains, ratio) for e in experts]
        return scaling**2 * sum(each) / len(each)
    if not parts:
        return scaling**2 * _growth(start, trains, ratio)
    total = 0.0
    for rows, own in blocks(parts, len(start.lora_A)):
        diag = None if start.lora_diag is None else start.lora_diag[own]
        part = Start(start.lora_A[own], start.lora_B[rows, own], lora_diag=diag)
        total += (rows.stop - rows.start) * _growth(part, trains, ratio)
    return scaling**2 * total / sum(end - begin for begin, end in parts)


def _growth(start: Start, trains: str, ratio: float) -> float:
    factors = start.lora_A, start.lora_B, start.lora_R, start.lora_diag
    return adam_growth(*factors, trains=trains, ratio=ratio)


def _kinds(layers: Sequence[LayerSize]) -> dict[tuple[object, ...], list[LayerSize]]:
    """The layers by their kinds, in the order of the model."""
    found: dict[tuple[object, ...], list[LayerSize]] = {}
    for layer in layers:
        found.setdefault(layer.kind, []).append(layer)
    return found
