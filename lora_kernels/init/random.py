"""Starts that are drawn at random: LoRA's own and its relatives. None reads W's values.

With `seed`, the numbers come from a generator of the start's own; without, from torch's global one,
as in every layer of torch. Layers of one shape that are given the same seed start alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.checks import as_integer, check_positive
from .base import Initializer, register_initializer
from .start import Start, StartRequest


@dataclass(frozen=True)
class _Random(Initializer):
    """The seed, which all random starts have."""

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
class LoRAOnEmbedding(_Random):
    """A = 0, B ~ N(0, 1). W does not change."""

    def make_start(self, request: StartRequest) -> Start:
        (rows, cols), generator = request.shape, self._generator(request.weight)
        lora_B = request.empty(rows, request.r).normal_(generator=generator)
        return Start(request.empty(request.r, cols).zero_(), lora_B)


@dataclass(frozen=True)
class LoRA(_Random):
    """A ~ U(±1/√m), B = 0 (Init[A]): kaiming_uniform_(a=√5) on A, as in PEFT and the authors' code.

    Hu et al., arXiv 2106.09685, section 4.1. W does not change: the layer starts as its base. Cost:
    A's random numbers. An embedding gets A = 0 and B ~ N(0, 1), as in PEFT and the authors' code.
    """

    def for_embedding(self) -> Initializer:
        """A = 0, B ~ N(0, 1): a token's column of A moves only if the token occurs."""
        return LoRAOnEmbedding(self.seed)

    def make_start(self, request: StartRequest) -> Start:
        (rows, cols), generator = request.shape, self._generator(request.weight)
        bound = 1 / math.sqrt(cols)
        lora_A = request.empty(request.r, cols).uniform_(-bound, bound, generator=generator)
        return Start(lora_A, request.empty(rows, request.r).zero_())


@dataclass(frozen=True)
class InitB(_Random):
    """A = 0, B ~ U(±1/√r): LoRA's start with A and B exchanged. kaiming_uniform_(a=√5) on B, whose
    fan-in is r.

    Init[B] of Hayou et al., arXiv 2406.08447, section 3. W does not change. Cost: B's random
    numbers.
    """

    def make_start(self, request: StartRequest) -> Start:
        (rows, cols), generator = request.shape, self._generator(request.weight)
        bound = 1 / math.sqrt(request.r)
        lora_B = request.empty(rows, request.r).uniform_(-bound, bound, generator=generator)
        return Start(request.empty(request.r, cols).zero_(), lora_B)


@dataclass(frozen=True)
class Gaussian(_Random):
    """A ~ N(0, 1/r²), B = 0: PEFT's `init_lora_weights="gaussian"`.

    W does not change. Cost: A's random numbers. An embedding starts as for `LoRA`, as in PEFT.
    """

    def for_embedding(self) -> Initializer:
        """As of `LoRA`."""
        return LoRAOnEmbedding(self.seed)

    def make_start(self, request: StartRequest) -> Start:
        (rows, cols), generator = request.shape, self._generator(request.weight)
        lora_A = request.empty(request.r, cols).normal_(std=1 / request.r, generator=generator)
        return Start(lora_A, request.empty(rows, request.r).zero_())


@dataclass(frozen=True)
class InitAB(_Random):
    """A, B ~ N(0, γ²/m), with the same variance for both; m = in_features.

    Init[AB] of arXiv 2505.23194, which tries `gamma` γ from 1/4 to 16. Not divided by s. W changes
    (W − s·BA). Cost: the random numbers, and one pass over W with r columns. No recipe: the layer
    stores the initial factors.
    """

    gamma: float = 1.0
    changes_base = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.gamma, "gamma")

    def make_start(self, request: StartRequest) -> Start:
        (rows, cols), generator = request.shape, self._generator(request.weight)
        std = self.gamma / math.sqrt(cols)
        lora_A = request.empty(request.r, cols).normal_(std=std, generator=generator)
        return Start(lora_A, request.empty(rows, request.r).normal_(std=std, generator=generator))


@dataclass(frozen=True)
class InitABPlus(InitAB):
    """Init[AB] with nothing subtracted: the layer starts as its base plus the noise s·BA.

    Init[AB+] of arXiv 2505.23194, which finds the noise harmless up to γ of about 8, at s of about
    1. W does not change. Cost: the random numbers.
    """

    changes_base = False
    grows_with_scaling = True


register_initializer("lora", LoRA)
register_initializer("init_b", InitB)
register_initializer("gaussian", Gaussian)
register_initializer("init_ab", InitAB)
register_initializer("init_ab_plus", InitABPlus)
