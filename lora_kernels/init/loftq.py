"""LoftQ: a quantised base, and the factors that make up for what the quantiser took (Li et al.,
"LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._utils.checks import as_integer, factor_dtype
from ..ops import svd
from .base import Initializer, register_initializer
from .quantizers import Quantizer, check_quantizer, quantized
from .spectral import refuse_small_rank, split
from .start import Start, subtract_factors_


@dataclass(frozen=True)
class LoftQ(Initializer):
    """W ← Q_T of Q_t = q(W − s·B_{t−1}A_{t−1}), s·B_tA_t = the best of rank r of W − Q_t, B₀A₀ = 0.

    Li et al., arXiv 2310.08659, algorithm 1, with T = `iterations` (5, the paper's) and q =
    `quantizer`, a name of `lora_kernels.init.quantizers.quantized` or a function W → quantised and
    dequantised W. Half of each σ / s is in A and half in B, as in PiSSA. Cost: T times a truncated
    SVD and a pass of the quantiser. There is no recipe: the factors are kept.

    ‖W − Q_t − s·B_tA_t‖ falls from step to step while r is small beside W's sizes. At r = 64 of a
    random 256 × 192 it rises from the third step on: take fewer there.

    W becomes its quantised values in W's own dtype, and the layer starts as Q_T + s·BA ≈ W.
    Quantising that base with the same quantiser, later or elsewhere, gives Q_T again: an adapter
    that is saved is one of Q_T, and the model has to be saved with it. The layer without its
    adapter is Q_T + s·B₀A₀, W but for what r components could not make up for.

    A base that is quantised already keeps its bits: the start for it is `toward`'s.

    `method` and `seed` are those of `lora_kernels.svd.truncated`.
    """

    quantizer: str | Quantizer = "nf4"
    iterations: int = 5
    method: str = "randomized"
    seed: int = 0
    changes_base = True
    rewrites_base = True
    reads_weight = True
    grows_with_scaling = False

    def __post_init__(self) -> None:
        check_quantizer(self.quantizer)
        if as_integer(self.iterations, "iterations") < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        svd.check_options(self.method)
        as_integer(self.seed, "seed")

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start, which belongs to the base that `take_out_` makes of `weight`.

        ValueError if W holds NaN or Inf, or its quantiser's values already, or if W − Q has a rank
        less than r.
        """
        if not math.isfinite(float(torch.linalg.vector_norm(weight, math.inf))):
            raise ValueError("weight holds NaN or Inf")
        start = None
        for _ in range(self.iterations):
            earlier, base = start, self._quantised(weight, start, scaling)
            start = _best(weight, base, r, scaling, method=self.method, seed=self.seed)
        return replace(start, rewritten=True, earlier=earlier)

    def take_out_(self, weight: Tensor, start: Start, scaling: float) -> None:
        """weight ← Q_T in place, q(weight − scaling · B_{T−1}A_{T−1}) again."""
        weight.copy_(self._quantised(weight, start.earlier, scaling))

    def _quantised(self, weight: Tensor, start: Start | None, scaling: float) -> Tensor:
        """q(W − s·BA) in W's dtype.

        Of values in W's dtype, too: a scale that is the largest entry of its block is then exact in
        it, and quantising the result changes nothing.
        """
        target = weight
        if start is not None:
            target = weight.detach().clone()
            subtract_factors_(target, start.lora_A, start.lora_B, scaling)
        return quantized(target, self.quantizer).to(weight.dtype)

    def toward(self, original: Callable[[], Tensor]) -> Initializer:
        """The start for a base that is quantised already, Q, and was made from what `original()`
        gives, W [out, in]: s·BA = the best of rank r of W − Q, Q unchanged. The quantiser and the
        iterations play no part.
        """
        return QuantizationError(original, self.method, self.seed)


@dataclass(frozen=True)
class QuantizationError(Initializer):
    """s·BA = the best of rank r of W − Q, where W = `original()` [out, in], and the weight that is
    given is Q, quantised and unchanged.

    LoftQ (arXiv 2310.08659) with its base fixed; PEFT's `replace_lora_weights_loftq`. Nothing is
    subtracted: training starts from Q + s·BA ≈ W, and Q is the layer without its adapter. W is
    asked for when the start is made, and not kept.
    """

    original: Callable[[], Tensor]
    method: str = "randomized"
    seed: int = 0
    changes_base = False
    reads_weight = True

    def __call__(
        self, weight: Tensor, r: int, scaling: float = 1.0, gradient: Tensor | None = None
    ) -> Start:
        """The start; ValueError if the two do not fit, or if W − Q is zero or has a rank less than
        r.
        """
        original = self.original().detach().to(weight.device)
        if original.shape != weight.shape:
            raise ValueError(
                f"the original weight has shape {list(original.shape)}, this one "
                f"{list(weight.shape)}"
            )
        return _best(original, weight, r, scaling, method=self.method, seed=self.seed)

    def starts(
        self,
        weights: Sequence[Tensor],
        r: int,
        scaling: float = 1.0,
        gradients: Sequence[Tensor] | None = None,
    ) -> list[Start]:
        """That of one weight: `original` is one layer's."""
        if len(weights) != 1:
            raise ValueError(f"one original weight makes one start, not {len(weights)}")
        return [self(weights[0], r, scaling)]


def _best(original: Tensor, Q: Tensor, r: int, scaling: float, **options) -> Start:
    """A and B with s·BA the best approximation of original − Q of rank r."""
    dtype = factor_dtype(original.dtype)
    error = original.to(dtype) - Q.to(dtype)
    U, S, Vh, _ = svd.truncated(error, r, **options)
    refuse_small_rank(S, error, "the quantisation error W − Q", "LoftQ")
    return split(U, S, Vh, scaling)


register_initializer("loftq", LoftQ)
