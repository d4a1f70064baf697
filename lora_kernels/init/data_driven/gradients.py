"""Starts from the loss gradient of the weight, G [out, in]: LoRA-GA, LoRA-One, LoRA-SB.

G is `StartRequest.gradient`, given as `LoRALinear.from_linear(..., gradient=G)`. None of these
starts has a recipe: the layer stores the initial factors. Each costs a truncated SVD of G, as PiSSA
costs one of W. ValueError if G is zero, is not finite, or does not have W's shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils.checks import FLOATS, as_integer, check_positive
from ...ops import svd
from ..base import Initializer, register_initializer
from ..spectral.triplets import refuse_small_rank
from ..start import Start, StartRequest


@dataclass(frozen=True)
class _DataDriven(Initializer):
    """The options of G's SVD, and the checks of G."""

    method: str = "randomized"
    seed: int = 0
    needs_gradient = True

    def __post_init__(self) -> None:
        svd.check_options(self.method)
        as_integer(self.seed, "seed")

    def _gradient(self, request: StartRequest) -> Tensor:
        """G [out, in], checked and on W's device."""
        weight, gradient, name = request.weight, request.gradient, type(self).__name__
        if gradient is None:
            raise ValueError(
                f"{name} starts from the loss gradient of the weight: give gradient=G [out, in]"
            )
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradient must be a tensor, got {type(gradient).__name__}")
        if gradient.shape != weight.shape:
            raise ValueError(
                f"gradient has shape {list(gradient.shape)}, the weight {list(weight.shape)}: "
                f"{name} needs the gradient of this weight"
            )
        if gradient.dtype not in FLOATS:
            raise TypeError(f"gradient must be a real float, got {gradient.dtype}")
        if gradient.is_meta or weight.is_meta:
            raise ValueError(f"{name} reads numbers: weight and gradient cannot be on meta")
        gradient = gradient.detach().to(weight.device)
        if not bool(gradient.isfinite().all()):
            raise ValueError("gradient holds NaN or Inf")
        if not bool(gradient.any()):
            raise ValueError(
                f"gradient is zero, so {name} has no direction to start in: did the loss depend "
                "on this layer?"
            )
        return gradient

    def _triplets(self, matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh, _ = svd.truncated(matrix, r, self.method, seed=self.seed)
        return U, S, Vh


@dataclass(frozen=True)
class LoRAGA(_DataDriven):
    """B = c·U[:, r:2r], A = c·V[:, :r]ᵀ of G = USVᵀ, c = n^{1/4} / √γ with n = out_features.

    Wang et al., arXiv 2407.05000, with the defaults of their code: B from left singular vectors r
    to 2r, A from the first r right ones, and their "stable" scale, where n is the number of W's
    rows and γ = `gamma` = 16. Depends neither on the singular values nor on s. W changes
    (W − s·BA). ValueError if 2r > min(n, m).
    """

    gamma: float = 16.0
    changes_base = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.gamma, "gamma")

    def make_start(self, request: StartRequest) -> Start:
        (rows, cols), r = request.shape, request.r
        gradient = self._gradient(request)
        if 2 * r > min(rows, cols):
            raise ValueError(
                f"LoRAGA takes 2r = {2 * r} singular vectors, more than min(n, m) = "
                f"{min(rows, cols)}; take r <= {min(rows, cols) // 2}"
            )
        U, _, Vh = self._triplets(gradient, 2 * r)
        scale = rows**0.25 / math.sqrt(self.gamma)
        return Start(scale * Vh[:r], scale * U[:, r:])  # [r, m], [n, r]


@dataclass(frozen=True)
class LoRAOne(_DataDriven):
    """B = U_r √(S_r / (σ₁γ)), A = √(S_r / (σ₁γ)) V_rᵀ of −G = USVᵀ: s·BA is a gradient step.

    Zhang et al., arXiv 2502.01235, algorithm 1, in the form of their code with γ = `gamma` = 128.
    Not divided by s. W does not change: training starts from W + s·BA. ValueError if G has a rank
    less than r: components beyond that rank would be zero in both A and B and would never train.
    """

    gamma: float = 128.0
    changes_base = False
    grows_with_scaling = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.gamma, "gamma")

    def make_start(self, request: StartRequest) -> Start:
        gradient = self._gradient(request)
        U, S, Vh = self._triplets(gradient, request.r)
        refuse_small_rank(S, gradient, "gradient", "LoRAOne")
        root = (S / (S[0] * self.gamma)).sqrt()
        return Start(root[:, None] * Vh, -U * root)  # the minus of −G


@dataclass(frozen=True)
class LoRASB(_DataDriven):
    """B = U_r, A = V_rᵀ of −η·sign(G) = USVᵀ, both frozen; only R = S_r / s [r, r] trains.

    Ponkshe et al., arXiv 2411.19557, section 3: y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ. −η·sign(G) is Adam's first
    step for a sum G of gradients (25 to 50 samples suffice), and η = `learning_rate` is the rate of
    that step: with a warm-up, its first rate. The default is the first rate of the authors'
    arithmetic runs, which warm up to 1e-4 in 333 steps. W does not change: training starts from W
    plus this step truncated to rank r.
    """

    learning_rate: float = 3e-7
    changes_base = False
    has_R = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.learning_rate, "learning_rate")

    def make_start(self, request: StartRequest) -> Start:
        check_positive(request.scaling, "scaling")
        U, S, Vh = self._triplets(self._gradient(request).sign(), request.r)
        return Start(Vh, -U, lora_R=torch.diag(self.learning_rate / request.scaling * S))


register_initializer("lora_ga", LoRAGA)
register_initializer("lora_one", LoRAOne)
register_initializer("lora_sb", LoRASB)
