"""Starts from W's leading part: PiSSA, OLoRA; and LoRA-XS, from its largest or smallest triplets.

PiSSA and OLoRA change W to W − s·BA. None of these starts has a recipe: the layer stores the
initial factors. So its base can be restored and a saved layer reloaded exactly, although an SVD may
give different bits next time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils.checks import check_positive
from ..._utils.errors import unknown_name
from ..base import register_initializer
from ..start import Start, StartRequest, batched
from .triplets import (
    Factorization,
    LargestTriplets,
    refuse_zero_values,
    refuse_zero_weights,
    smallest_triplets,
    split,
)

_PARTS = ("top", "bottom")


@dataclass(frozen=True)
class PiSSA(LargestTriplets):
    """B = U_r √(S_r / s), A = √(S_r / s) V_rᵀ of the r largest singular triplets of W = USVᵀ.

    Meng et al., arXiv 2404.02948, equations 2 and 3; s·BA is the best approximation of W of rank r.
    W changes (W − s·BA). Cost: about ten products of W with r columns; with `method="exact"` a full
    SVD, 12 to 40 s for 4096 × 4096 on 2 cores. No recipe: the layer stores the initial factors.

    `method`, `seed`, `subspace` and `tol` are those of `lora_kernels.svd.truncated`.
    """

    changes_base = True

    def _start(self, U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Start:
        return split(U, S, Vh, scaling)


@dataclass(frozen=True)
class OLoRA(Factorization):
    """B = Q[:, :r], A = R[:r] of W = QR, with signs that make the diagonal of R positive.

    Büyükakyüz, arXiv 2406.01775. Deterministic; not divided by s. W changes (W − s·BA). Cost: a QR
    of W's first r columns and one product of W with r columns. No recipe: the layer stores the
    initial factors. ValueError if W holds NaN or Inf.

    B is orthonormal for every W. So every component trains, even where A starts at zero because W
    has a rank less than r.
    """

    changes_base = True

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        weights, r, _ = batched(requests)
        Q, R = torch.ops.lora.thin_qr_foreach(weights, r)  # [k, n, r], [k, r, m]
        return [Start(right, left) for left, right in zip(Q, R, strict=True)]


@dataclass(frozen=True)
class LoRAXS(LargestTriplets):
    """B = U_r, A = S_r V_rᵀ of W = USVᵀ, both frozen; R ~ N(0, σ²) [r, r], σ = `sigma`, trains.

    Bałazy et al., arXiv 2405.17604, section 3: y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ. The paper's s is 1:
    `lora_alpha` = r. W does not change: s·B R A is about 1e-5 of W. Cost: that of PiSSA. No recipe:
    the layer stores A and B.

    `retain_part`, named as in the authors' code, is "top", the r largest triplets, or "bottom", the
    r smallest in descending order, at MiLoRA's cost. ValueError if one of these values is zero: A
    would be zero there, and R would never train.

    `method`, `subspace` and `tol` are those of `lora_kernels.svd.truncated`; "bottom" has no
    `subspace` and no `tol`. `seed` seeds the SVD, and R's own generator.
    """

    sigma: float = 1e-5
    retain_part: str = "top"
    changes_base = False
    has_R = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.sigma, "sigma")
        if self.retain_part not in _PARTS:
            raise unknown_name("retain_part", self.retain_part, _PARTS)
        for name in ("subspace", "tol"):
            if self.retain_part == "bottom" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for the largest triplets: retain_part='top'")

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        if self.retain_part == "top":
            return super().make_starts(requests)
        weights, r, scaling = batched(requests)
        largest = refuse_zero_weights(weights, "LoRAXS")
        U, S, Vh = smallest_triplets(weights, r, self.method, self.seed)
        refuse_zero_values(S, weights, largest, "LoRAXS")
        return [self._start(*triplets, scaling) for triplets in zip(U, S, Vh, strict=True)]

    def _start(self, U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> Start:
        r = len(S)
        lora_R = torch.empty(r, r, dtype=U.dtype, device=U.device)
        generator = torch.Generator(U.device).manual_seed(int(self.seed))
        return Start(S[:, None] * Vh, U, lora_R=lora_R.normal_(std=self.sigma, generator=generator))


register_initializer("pissa", PiSSA)
register_initializer("olora", OLoRA)
register_initializer("lora_xs", LoRAXS)
