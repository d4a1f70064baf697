"""Starts from the loss gradient of the weight, G [out, in]: LoRA-GA, LoRA-One, LoRA-SB.

G is given in the call, and by `LoRALinear.from_linear(..., gradient=G)`. The factors have no
recipe: a layer keeps them. All cost a truncated SVD of G, as PiSSA's does of W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.checks import FLOATS, as_integer, check_positive
from ..ops import svd
from .base import Initializer, register_initializer
from .spectral import refuse_small_rank
from .start import Start


@dataclass(frozen=True)
class _DataDriven(Initializer):
    """What they share: how G is checked, and the options of its SVD."""

    method: str = "randomized"
    seed: int = 0
    needs_gradient = True

    def __post_init__(self) -> None:
        svd.check_options(self.method)
        as_integer(self.seed, "seed")

    def _checked(self, gradient: Tensor | None, weight: Tensor) -> Tensor:
        """G on W's device."""
        name = type(self).__name__
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
                f"gradient is zero, so {name} has no direction to start in: was the layer used, "
                "and the loss not constant?"
            )
        return gradient

    def _triplets(self, matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh, _ = svd.truncated(matrix, r, self.method, seed=self.seed)
        return U, S, Vh


@dataclass(frozen=True)
class LoRAGA(_DataDriven):
    """B = c·U[:, r:2r], A = c·V[:, :r]ᵀ of G = USVᵀ, c = n^{1/4} / √γ with n = out_features.

    Wang et al., arXiv 2407.05000, and their code's defaults: B from the second r left singular
    vectors, A from the first r right ones, "stable" scale with n the rows of W (the scale of the
    output) and γ = `gamma` = 16. No singular value enters, and s does not. W changes (W − s·BA).
    """

    gamma: float = 16.0
    changes_base = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.gamma, "gamma")

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; ValueError if G does not fit, is zero or not finite, or if 2r > min(n, m)."""
        rows, cols = weight.shape
        gradient = self._checked(gradient, weight)
        if 2 * r > min(rows, cols):
            raise ValueError(
                f"LoRAGA takes 2r = {2 * r} singular vectors, more than min(n, m) = "
                f"{min(rows, cols)}; take r <= {min(rows, cols) // 2}"
            )
        U, _, Vh = self._triplets(gradient, 2 * r)
        scale = rows**0.25 / math.sqrt(self.gamma)
        return Start(scale * Vh[:r], scale * U[:, r:])


@dataclass(frozen=True)
class LoRAOne(_DataDriven):
    """B = U_r √(S_r / (σ₁γ)), A = √(S_r / (σ₁γ)) V_rᵀ of −G = USVᵀ: s·BA is a gradient step.

    Zhang et al., arXiv 2502.01235, algorithm 1, in their code's form with γ = `gamma` = 128. Not
    divided by s. W does not change: training starts from W + s·BA.
    """

    gamma: float = 128.0
    changes_base = False
    grows_with_scaling = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.gamma, "gamma")

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; ValueError if G does not fit, is zero or not finite, or has a rank less than
        r: what lies beyond it would be zero in A and in B, where both gradients vanish.
        """
        gradient = self._checked(gradient, weight)
        U, S, Vh = self._triplets(gradient, r)
        refuse_small_rank(S, gradient, "gradient", "LoRAOne")
        root = (S / (S[0] * self.gamma)).sqrt()
        return Start(root[:, None] * Vh, -U * root)  # the minus of −G


@dataclass(frozen=True)
class LoRASB(_DataDriven):
    """B = U_r, A = V_rᵀ of −η·sign(G) = USVᵀ, both frozen; only R = S_r / s [r, r] trains.

    Ponkshe et al., arXiv 2411.19557, section 3: y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ. −η·sign(G) is the first
    step of Adam from a sum G of gradients (25 to 50 samples do), and η = `learning_rate` that of
    this step: with a warm-up, the first of it. The default is that of the authors' arithmetic runs,
    1e-4 after 333 steps. W does not change: training starts from W and the truncated step.
    """

    learning_rate: float = 3e-7
    changes_base = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.learning_rate, "learning_rate")

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; ValueError if G does not fit, is zero or not finite, or s is not positive."""
        check_positive(scaling, "scaling")
        U, S, Vh = self._triplets(self._checked(gradient, weight).sign(), r)
        return Start(Vh, -U, lora_R=torch.diag(self.learning_rate / scaling * S))


register_initializer("lora_ga", LoRAGA)
register_initializer("lora_one", LoRAOne)
register_initializer("lora_sb", LoRASB)
