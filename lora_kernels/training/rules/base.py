"""`Rule`: the base class of optimizer rules."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .blocks import Block
from .pairs import FactorPair
from .spectrum import Spectrum


@dataclass(frozen=True)
class Rule(ABC):
    """Rewrites the gradients of A and B between the backward and the optimizer's step.

    A rule has no state, and is linear in the gradients: a common factor of all gradients, such as
    the factor of clipping by norm or GradScaler's scale, may be applied before or after the rule.

    Attributes:
        damping: δ, which is added to the eigenvalues of AAᵀ and of BᵀB.

    """

    damping: float
    name: ClassVar[str]
    needs_A: ClassVar[bool] = True  # whether A trains
    positive: ClassVar[bool] = False  # whether the damping must not be 0

    def __post_init__(self) -> None:
        value = self.damping
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"damping must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and (value > 0 if self.positive else value >= 0)):
            least = "positive" if self.positive else "at least 0"
            raise ValueError(f"damping of {self.name} must be {least} and finite, got {value}")

    def prepare_(self, pairs: Sequence[FactorPair]) -> list[FactorPair]:
        """Checks the gradients. Returns the pairs to rewrite, those that the backward has reached.

        Raises:
            ValueError: only one of A and B has a gradient, and the rule needs both.
            TypeError: a gradient is sparse.

        """
        for pair in pairs:
            pair.check_dense()
            if self.needs_A and (pair.lora_A.grad is None) != (pair.lora_B.grad is None):
                missing = "A" if pair.lora_A.grad is None else "B"
                raise ValueError(
                    f"{missing} of layer {pair.name!r} has no gradient, the other factor has one: "
                    f"{self.name} needs both or none"
                )
        return [pair for pair in pairs if pair.lora_B.grad is not None]

    @abstractmethod
    def rewrite_(self, blocks: Sequence[Block]) -> None:
        """Overwrites the gradients of blocks of one rank, dtype and device."""


def gram(rows: Tensor) -> Tensor:
    """M Mᵀ, float64 [N, r, r], of M [N, r, k].

    It is float64 because its condition number is the square of M's, and because products of float32
    may be TF32 on a GPU.
    """
    wide = rows.double()
    return wide @ wide.mT


def spectrum(blocks: Sequence[Block], grams: Iterable[Tensor]) -> Spectrum:
    """The spectrum of the blocks' Gram matrices, by one call for all blocks."""
    return Spectrum.of(torch.cat(tuple(grams)), blocks[0].eps)


def split(blocks: Sequence[Block], matrices: Tensor) -> list[Tensor]:
    """`matrices` [N of all blocks, r, r] for each block, in the dtype of its stacked tensors."""
    parts = matrices.split([block.count for block in blocks])
    return [block.matching(part) for block, part in zip(blocks, parts, strict=True)]
