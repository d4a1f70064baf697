"""Starts that are drawn at random: LoRA's own and its relatives. None reads W's values.

With `seed`, the numbers come from the start's own generator; without it, from torch's global one,
as in every layer of torch. Layers of one shape with the same seed get the same start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.checks import as_integer, check_positive
from .base import Initializer, register_initializer
from .start import Start, StartRequest


def seeded_generator(seed: int | None, weight: Tensor) -> torch.Generator | None:
    """A generator on the weight's device; None, torch's global one, without a seed."""
    if seed is None or weight.is_meta:
        return None
    return torch.Generator(weight.device).manual_seed(int(seed))


def kaiming_A(request: StartRequest, generator: torch.Generator | None) -> Tensor:
    """A ~ U(±1/√m) [r, m]: kaiming_uniform_(a=√5)."""
    bound = 1 / math.sqrt(request.shape[1])
    A = request.empty(request.r, request.shape[1])
    return A.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class _Random(Initializer):
    """The seed, which all random starts have."""

    seed: int | None = None
    changes_base = False

    def __post_init__(self) -> None:
        if self.seed is not None:
            as_integer(self.seed, "seed")

    def _generator(self, weight: Tensor) -> torch.Generator | None:
        return seeded_generator(self.seed, weight)


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
        lora_A = kaiming_A(request, self._generator(request.weight))
        return Start(lora_A, request.empty(request.shape[0], request.r).zero_())


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

    W does not change. Cost: A's random numbers. An embedding starts as with `LoRA`, as in PEFT.
    """

    def for_embedding(self) -> Initializer:
        """The same as for `LoRA`."""
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


@dataclass(frozen=True)
class Orthogonal(_Random):
    """A = (X₁Q₁)ᵀ/10, B = X₂ᵀQ₂/10, where Q₁ and Q₂ [r/2, r] are every other row of a random
    orthogonal matrix, and X₁ [m, r/2] and X₂ [r/2, n] ~ N(0, 1): BA = 0 although neither is zero.

    PEFT's `init_lora_weights="orthogonal"`, after the post "Rethinking LoRA initialisation"
    (datta0.github.io). Not divided by s. W does not change: s·BA is zero except for the rounding of
    A and B, about 1e-7 of ‖A‖‖B‖, and nothing is subtracted. Cost: the random numbers and two
    products with r columns. ValueError for an odd r and, as in PEFT, for embeddings.
    """

    def for_embedding(self) -> Initializer:
        raise ValueError(
            "Orthogonal is for linear layers, not for embeddings: take another start, or leave the "
            "embedding out with exclude_modules"
        )

    def make_start(self, request: StartRequest) -> Start:
        (rows, cols), r = request.shape, request.r
        if r % 2:
            raise ValueError(f"Orthogonal needs an even rank, got r = {r}: take r = {r + 1}")
        generator = self._generator(request.weight)

        def drawn(*shape: int) -> Tensor:
            return request.empty(*shape).normal_(generator=generator)

        Q = torch.linalg.qr(drawn(r, r).double())[0].to(request.factor_dtype)
        lora_A = Q[0::2].mT @ drawn(r // 2, cols).div_(10)
        return Start(lora_A, drawn(rows, r // 2).div_(10) @ Q[1::2])


register_initializer("lora", LoRA)
register_initializer("init_b", InitB)
register_initializer("gaussian", Gaussian)
register_initializer("init_ab", InitAB)
register_initializer("init_ab_plus", InitABPlus)
register_initializer("orthogonal", Orthogonal)
