"""Starts that are drawn at random: LoRA's own and its relatives. None reads W's values.

With `seed` a draw is that of a generator of its own; without, of torch's global one, as in every
layer of torch. Layers of one shape that are given one seed start alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.checks import as_integer, check_positive, factor_dtype
from .base import Initializer, register_initializer
from .start import Start


@dataclass(frozen=True)
class _Random(Initializer):
    """What they share: the seed."""

    seed: int | None = None
    changes_base = False

    def __post_init__(self) -> None:
        if self.seed is not None:
            as_integer(self.seed, "seed")

    def _generator(self, weight: Tensor) -> torch.Generator | None:
        if self.seed is None or weight.is_meta:
            return None
        return torch.Generator(weight.device).manual_seed(int(self.seed))


@dataclass(frozen=True)
class LoRA(_Random):
    """A ~ U(±1/√m), B = 0 (Init[A]): kaiming_uniform_(a=√5) on A, as in PEFT and the authors' code.

    Hu et al., arXiv 2106.09685, section 4.1. W does not change: the layer starts as its base. Cost:
    A's random numbers. With `seed` they are those of a generator of its own; without, of torch's.
    """

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; `weight` gives shape, dtype and device only."""
        rows, cols = weight.shape
        bound = 1 / math.sqrt(cols)
        lora_A = _empty(weight, r, cols).uniform_(-bound, bound, generator=self._generator(weight))
        return Start(lora_A, _empty(weight, rows, r).zero_())


@dataclass(frozen=True)
class InitB(_Random):
    """A = 0, B ~ U(±1/√r): the other way round, kaiming_uniform_(a=√5) on B, whose fan-in is r.

    Init[B] of Hayou et al., arXiv 2406.08447, section 3. W does not change. Cost: B's random
    numbers.
    """

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; `weight` gives shape, dtype and device only."""
        rows, cols = weight.shape
        bound = 1 / math.sqrt(r)
        lora_B = _empty(weight, rows, r).uniform_(-bound, bound, generator=self._generator(weight))
        return Start(_empty(weight, r, cols).zero_(), lora_B)


@dataclass(frozen=True)
class Gaussian(_Random):
    """A ~ N(0, 1/r²), B = 0: PEFT's `init_lora_weights="gaussian"`.

    W does not change. Cost: A's random numbers.
    """

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; `weight` gives shape, dtype and device only."""
        rows, cols = weight.shape
        lora_A = _empty(weight, r, cols).normal_(std=1 / r, generator=self._generator(weight))
        return Start(lora_A, _empty(weight, rows, r).zero_())


@dataclass(frozen=True)
class InitAB(_Random):
    """A, B ~ N(0, γ²/m), the same variance for both, of m = in_features.

    Init[AB] of arXiv 2505.23194, which tries `gamma` γ from 1/4 to 16. Not divided by s. W changes
    (W − s·BA). Cost: the random numbers, and one pass over W with r columns. There is no recipe:
    the factors are kept.
    """

    gamma: float = 1.0
    changes_base = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.gamma, "gamma")

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; `weight` gives shape, dtype and device only."""
        rows, cols = weight.shape
        std, generator = self.gamma / math.sqrt(cols), self._generator(weight)
        lora_A = _empty(weight, r, cols).normal_(std=std, generator=generator)
        return Start(lora_A, _empty(weight, rows, r).normal_(std=std, generator=generator))


@dataclass(frozen=True)
class InitABPlus(InitAB):
    """Init[AB] with nothing subtracted: the layer starts as its base and the noise s·BA.

    Init[AB+] of arXiv 2505.23194, which finds the noise harmless up to γ of about 8, at s of about
    1. W does not change. Cost: the random numbers.
    """

    changes_base = False
    grows_with_scaling = True


def _empty(weight: Tensor, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=factor_dtype(weight.dtype), device=weight.device)


register_initializer("lora", LoRA)
register_initializer("init_b", InitB)
register_initializer("gaussian", Gaussian)
register_initializer("init_ab", InitAB)
register_initializer("init_ab_plus", InitABPlus)
