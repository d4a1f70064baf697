"""Starts from W's r smallest singular triplets: MiLoRA, MiCA, KaSA.

None of these starts has a recipe: the layer stores the initial factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..._utils.checks import as_integer
from ...ops import svd
from ..base import Initializer, register_initializer
from ..random import kaiming_A, seeded_generator
from ..start import Start, StartRequest, batched
from .triplets import (
    Factorization,
    refuse_zero_values,
    refuse_zero_weights,
    smallest_triplets,
    split,
)


@dataclass(frozen=True)
class _Minor(Factorization):
    """The options of `lora_kernels.svd.minor`."""

    method: str = "randomized"
    seed: int = 0

    def __post_init__(self) -> None:
        svd.check_options(self.method)
        as_integer(self.seed, "seed")


@dataclass(frozen=True)
class MiLoRA(_Minor):
    """PiSSA's formula for the r smallest singular triplets, in descending order.

    Wang et al., arXiv 2406.09044, section 3. W changes (W − s·BA), by its r smallest components.
    Cost: a factorization of W (square) or of WᵀW (not square) in float64 and some solves; with
    `method="exact"` a full SVD. No recipe: the layer stores the initial factors.

    A singular value that is zero up to rounding gives small factors, which still train. ValueError
    if a value is less than 1e-12 of W's largest entry, because its factors would never train, or if
    W holds NaN or Inf.

    `method` and `seed` are those of `lora_kernels.svd.minor`.
    """

    changes_base = True
    grows_with_scaling = False

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        weights, r, scaling = batched(requests)
        largest = refuse_zero_weights(weights, "MiLoRA")
        U, S, Vh = smallest_triplets(weights, r, self.method, self.seed)
        refuse_zero_values(S, weights, largest, "MiLoRA")
        return [split(*triplets, scaling) for triplets in zip(U, S, Vh, strict=True)]


@dataclass(frozen=True)
class MiCA(_Minor):
    """B = U[:, −r:], the left singular vectors of the r smallest σ of W = USVᵀ, frozen; A = 0. Only
    A trains.

    Rüdiger and Raschka, arXiv 2604.01694; formula and order of the columns (σ descending) are those
    of PEFT's `mica_init`. B is orthonormal and not divided by s, even if W has a rank less than r.
    W does not change, and the layer starts as its base. Cost: that of MiLoRA. ValueError if W holds
    NaN or Inf.

    Where several σ are equal, as the zeros of a W of small rank, any orthonormal basis of their
    vectors is a valid B, and another implementation may find a different one.

    On an embedding, whose W is [dim, tokens], a token's column of A moves only if the token occurs.

    `method` and `seed` are those of `lora_kernels.svd.minor`.
    """

    changes_base = False
    trains = "A"

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        weights, r, _ = batched(requests)
        U, _, _ = smallest_triplets(weights, r, self.method, self.seed)
        return [
            Start(request.empty(r, request.shape[1]).zero_(), left)
            for request, left in zip(requests, U, strict=True)
        ]


@dataclass(frozen=True)
class KaSA(Factorization):
    """W ← W − U_r S_r V_rᵀ of its r smallest singular triplets; A ~ U(±1/√m) and B = 0 as for LoRA,
    and λ ~ N(0, 1) [r] between them: y = x W′ᵀ + s·x Aᵀ diag(λ) Bᵀ. A, B and λ train.

    Wang et al., arXiv 2412.06071; PEFT's `KasaLinearVariant`. The r triplets stay removed while the
    adapter is on: the layer starts as its truncated base, not as its base. They are stored, so that
    `disable_adapters` and `unload_lora` restore W, which PEFT's KaSA cannot do.

    The paper adds penalties to the loss: `lora_kernels.optim.kasa_penalty`.

    PEFT and this class remove the last r of min(n, m) triplets, as the paper does. The authors'
    code keeps the first m − r of them: if n < m, it removes fewer triplets, or none.

    Cost: that of MiLoRA. ValueError if r is not less than min(n, m), or if W holds NaN or Inf; an
    embedding is refused.

    `method` is that of `lora_kernels.svd.minor`. `seed` seeds the SVD and the generator of A and λ;
    None draws these from torch's global generator.
    """

    method: str = "randomized"
    seed: int | None = None
    changes_base = True
    grows_with_scaling = False
    has_diag = True

    def __post_init__(self) -> None:
        svd.check_options(self.method)
        if self.seed is not None:
            as_integer(self.seed, "seed")

    def for_embedding(self) -> Initializer:
        """Raises ValueError: PEFT and the paper have no KaSA for embeddings."""
        raise ValueError(
            "KaSA is for linear layers, not for embeddings: take another start, or leave the "
            "embedding out with exclude_modules"
        )

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        weights, r, scaling = batched(requests)
        smallest = min(weights[0].shape)
        if r >= smallest:
            raise ValueError(
                f"KaSA takes r = {r} of the {smallest} singular triplets away, and nothing is left "
                f"of the weight: take r < {smallest}"
            )
        U, S, Vh = smallest_triplets(weights, r, self.method, self.seed or 0)
        taken = [split(*triplets, scaling) for triplets in zip(U, S, Vh, strict=True)]
        return [self._drawn(own, part) for own, part in zip(requests, taken, strict=True)]

    def _drawn(self, request: StartRequest, part: Start) -> Start:
        """A, B and λ, with the removed triplets as B₀ and A₀."""
        generator = seeded_generator(self.seed, request.weight)
        lora_A = kaiming_A(request, generator)
        lora_B = torch.zeros_like(part.lora_B)
        lora_diag = request.empty(request.r).normal_(generator=generator)
        return Start(lora_A, lora_B, lora_diag=lora_diag, taken=(part.lora_A, part.lora_B))


register_initializer("milora", MiLoRA)
register_initializer("mica", MiCA)
register_initializer("kasa", KaSA)
