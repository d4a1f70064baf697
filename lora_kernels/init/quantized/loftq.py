"""LoftQ: a quantized base, and factors that compensate for its quantization error (Li et al.,
"LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", arXiv 2310.08659).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..._utils.checks import all_finite, as_integer, factor_dtype
from ...ops import svd
from ..base import Initializer, register_initializer
from ..spectral.triplets import refuse_small_rank, split
from ..start import Start, StartRequest, subtract_factors_
from .quantizers import Quantizer, check_quantizer, quantized


@dataclass(frozen=True)
class LoftQ(Initializer):
    """W ← Q_T of Q_t = q(W − s·B_{t−1}A_{t−1}), where s·B_tA_t is the best approximation of W − Q_t
    of rank r and B₀A₀ = 0.

    Li et al., arXiv 2310.08659, algorithm 1, with T = `iterations` (5, as in the paper) and q =
    `quantizer`: a name that `lora_kernels.init.quantizers.quantized` accepts, or a function from W
    to its quantized and dequantized values. A and B each get a factor √(σ / s), as in PiSSA.
    Cost: T truncated SVDs and T passes of the quantizer. No recipe: the layer stores the initial
    factors.

    ‖W − Q_t − s·B_tA_t‖ falls with every step while r is small relative to W's dimensions. At
    r = 64 and a random W of 256 × 192 it rises from the third step on: use fewer steps there.

    W becomes its quantized values, in W's own dtype, and the layer starts as Q_T + s·BA ≈ W.
    Quantizing that base again with the same quantizer gives Q_T. A saved adapter belongs to Q_T, so
    the model has to be saved with it. Without its adapter the layer is Q_T + s·B₀A₀: W, except for
    the part of the quantization error that rank r cannot represent.

    A base that is already quantized stays as it is: `toward` returns the initializer for it.

    `method` and `seed` are those of `lora_kernels.svd.truncated`. ValueError if W holds NaN or Inf,
    if its values are already the quantizer's, or if W − Q has a rank less than r.
    """

    quantizer: str | Quantizer = "nf4"
    iterations: int = 5
    method: str = "randomized"
    seed: int = 0
    changes_base = True
    rewrites_base = True
    reads_weight = True
    grows_with_scaling = False
    compensates = True

    def __post_init__(self) -> None:
        check_quantizer(self.quantizer)
        as_integer(self.iterations, "iterations", minimum=1)
        svd.check_options(self.method)
        as_integer(self.seed, "seed")

    def make_start(self, request: StartRequest) -> Start:
        weight, r, scaling = request.weight, request.r, request.scaling
        if not all_finite(weight):
            raise ValueError("weight holds NaN or Inf")

        def improved(earlier: Start | None) -> Start:
            base = self._quantized(weight, earlier, scaling)
            return _best(weight, base, r, scaling, self.method, self.seed)

        earlier = None
        for _ in range(self.iterations - 1):
            earlier = improved(earlier)
        return replace(improved(earlier), rewritten=True, earlier=earlier)

    def take_out_(self, weight: Tensor, start: Start, scaling: float) -> None:
        """weight ← Q_T = q(weight − scaling · B_{T−1}A_{T−1}) in place."""
        weight.copy_(self._quantized(weight, start.earlier, scaling))

    def _quantized(self, weight: Tensor, start: Start | None, scaling: float) -> Tensor:
        """q(W − s·BA) in W's dtype.

        W − s·BA is rounded to W's dtype before it is quantized: each scale, the largest entry of
        its block, is then exact in that dtype, and quantizing the result again changes nothing.
        """
        target = weight
        if start is not None:
            target = weight.detach().clone()
            subtract_factors_(target, start.lora_A, start.lora_B, scaling)
        return quantized(target, self.quantizer).to(weight.dtype)

    def toward(self, original: Callable[[], Tensor]) -> Initializer:
        """The initializer for a base Q that is already quantized; `original()` returns the weight W
        [out, in] from which Q was made: s·BA is the best approximation of W − Q of rank r, and Q
        does not change. `quantizer` and `iterations` have no effect.
        """
        return _QuantizedBaseLoftQ(original, self.method, self.seed)


@dataclass(frozen=True)
class _QuantizedBaseLoftQ(Initializer):
    """s·BA is the best approximation of rank r of W − Q, where W = `original()` [out, in] and Q is
    the weight in the request, dequantized.

    LoftQ (arXiv 2310.08659) with a fixed base; PEFT's `replace_lora_weights_loftq`. Nothing is
    subtracted: training starts from Q + s·BA ≈ W, and without its adapter the layer is Q.
    `original` is called when the start is computed, and W is not kept. ValueError if the shapes
    differ, or if W − Q is zero or has a rank less than r.
    """

    original: Callable[[], Tensor]
    method: str = "randomized"
    seed: int = 0
    changes_base = False
    reads_weight = True

    def make_start(self, request: StartRequest) -> Start:
        weight = request.weight
        original = original_of(self.original, weight)
        return _best(original, weight, request.r, request.scaling, self.method, self.seed)

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        if len(requests) != 1:
            raise ValueError(f"one original weight makes one start, not {len(requests)}")
        return super().make_starts(requests)


def original_of(original: Callable[[], Tensor], weight: Tensor) -> Tensor:
    """The weight before quantization, on the device of `weight`; ValueError for another shape."""
    found = original().detach().to(weight.device)
    if found.shape != weight.shape:
        raise ValueError(
            f"the original weight has shape {list(found.shape)}, this one {list(weight.shape)}"
        )
    return found


def _best(original: Tensor, Q: Tensor, r: int, scaling: float, method: str, seed: int) -> Start:
    """A and B where s·BA is the best approximation of original − Q of rank r."""
    dtype = factor_dtype(original.dtype)
    error = original.to(dtype) - Q.to(dtype)
    U, S, Vh, _ = svd.truncated(error, r, method, seed=seed)
    refuse_small_rank(S, error, "the quantization error W − Q", "LoftQ")
    return split(U, S, Vh, scaling)


register_initializer("loftq", LoftQ)
