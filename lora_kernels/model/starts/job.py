"""`StartJob`: a layer whose start is to be computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ...init.base import Initializer
from ...init.fused import Parts
from ...layers.base import BaseLayer
from ...layers.kinds import EMBEDDING


@dataclass(frozen=True)
class StartJob:
    """A layer whose start is to be computed, with rank `r` and s = `scaling`.

    `absorb` says whether s·B₀A₀ will be subtracted from the weight, whose dtype must then be able
    to hold the difference. `aliases` are further names of the layer, for its gradient. If `parts`
    is not empty, each of these P parts of W gets its own start, of rank r / P.
    """

    name: str
    base: BaseLayer
    initializer: Initializer
    r: int
    scaling: float
    absorb: bool = False
    aliases: Sequence[str] = ()
    parts: Parts = ()

    def __post_init__(self) -> None:
        if self.base.kind == EMBEDDING:
            with naming(self.name):
                object.__setattr__(self, "initializer", self.initializer.for_embedding())

    @property
    def matrix_rank(self) -> int:
        """The rank of the start that is computed: r, or the rank of a part."""
        return self.r // max(1, len(self.parts))

    def named(self, matrix: int) -> str:
        """The name of the layer, or of one of its experts."""
        return self.name if self.base.num_experts is None else f"{self.name}[{matrix}]"


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Adds the layer's name in front of the text of a ValueError or TypeError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{layer}: {error}") from error
