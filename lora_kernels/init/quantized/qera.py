"""QERA: factors that compensate for a base's quantization error, in the metric of the inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils.checks import all_finite, as_integer, check_positive
from ...ops import svd
from ..base import Initializer, register_initializer
from ..data_driven.activations import Activations, FromActivations, measured
from ..spectral.triplets import refuse_missing_rank, refuse_small_rank
from ..start import Start, StartRequest
from .loftq import original_of
from .quantizers import Quantizer, check_quantizer, quantized

_ERROR = "the quantization error W − Q"
_ON_INPUTS = f"{_ERROR} on the inputs"
_SQUARES = 1e-8  # above this share of the largest, S² in float64 has 8 digits


class _QERA(FromActivations):
    """The start for an original weight and its quantized values."""

    exact: bool
    method: str
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.exact, bool):
            raise TypeError(f"exact must be True or False, got {self.exact!r}")
        svd.check_options(self.method)
        as_integer(self.seed, "seed")

    def _best(self, request: StartRequest, original: Tensor, Q: Tensor) -> Start:
        """A and B where s·BA is the best approximation of original − Q for the inputs."""
        found = measured(request, "QERA", needs_gram=self.exact)
        check_positive(request.scaling, "scaling")
        if found.count < request.r:
            raise ValueError(
                f"activations are of {found.count} inputs, on which no error has the rank "
                f"r = {request.r}: capture more of them"
            )
        error = original.double() - Q.double()
        if self.exact:
            U, S = self._exact_triplets(error, found.moment().to(error.device), request.r)
        else:  # nothing cancels: float32 is enough
            U, S = self._triplets(_times_diagonal(error, found).to(request.factor_dtype), request.r)
        refuse_small_rank(S, error, _ON_INPUTS, "QERA")
        U, S = U.double(), S.double()
        rows = U.mT @ error
        refuse_missing_rank(rows, request, _ERROR, "QERA")
        if self.exact:
            _refuse_noise(S, rows, found)
        lora_A, lora_B = rows / S[:, None], U * (S / request.scaling)
        return Start(lora_A.to(request.factor_dtype), lora_B.to(request.factor_dtype))

    def _exact_triplets(self, error: Tensor, moment: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """U [n, r] and S [r] of the error [n, m] times an F with FFᵀ = R [m, m], in float64."""
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not int(failed):
            return self._triplets(error @ factor, r)
        rows, cols = error.shape
        if rows <= 2 * cols:  # S² from two products takes a fifth of an eigendecomposition's time
            U, squares = self._triplets(error @ moment @ error.mT, r)
            if float(squares[-1]) > _SQUARES * float(squares[0]):
                return U, squares.sqrt()
        values, vectors = torch.linalg.eigh(moment)
        return self._triplets(error @ (vectors * values.clamp_(min=0).sqrt_()), r)

    def _triplets(self, weighted: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """U [n, r] and S [r] of the r largest triplets."""
        U, S, _, _ = svd.truncated(weighted, r, self.method, seed=self.seed)
        return U, S


@dataclass(frozen=True)
class QERA(_QERA):
    """W ← Q = q(W), and s·BA is the matrix of rank r that minimizes the mean square of x
    (W − Q − s·BA)ᵀ over the layer's inputs x.

    Zhang et al., arXiv 2410.06040, and the authors' code: with (W − Q)R^½ = USVᵀ for R = Σ xᵀx / N
    (`exact`, theorem 1) or its diagonal alone (`exact=False`, QERA-approx, theorem 2), B = U_r S_r
    / s and A = V_rᵀR^{−½}. q = `quantizer`, as for `LoftQ`.

    Neither the root nor its inverse is computed: V_rᵀR^{−½} = S_r⁻¹U_rᵀ(W − Q), and U and S are
    those of (W − Q)F for every F with FFᵀ = R, such as a Cholesky factor. So R may be singular,
    where the authors' code replaces zeros by rounding errors.

    W becomes its quantized values, in W's own dtype. The notes of `LoftQ` on saving the base and on
    quantizing it again apply here too. A base that is already quantized stays as it is: `toward`
    returns the initializer for it.

    Cost: a Cholesky factorization of [m, m] and a product of W with it in float64, or two products
    with R if it is singular, and a truncated SVD; a sketch is enough for `exact=False`. ValueError
    if W holds NaN or Inf, or if W − Q has a rank less than r on the inputs.

    `method` and `seed` are those of `lora_kernels.svd.truncated`.
    """

    quantizer: str | Quantizer = "nf4"
    exact: bool = True
    method: str = "randomized"
    seed: int = 0
    changes_base = True
    rewrites_base = True
    reads_weight = True
    compensates = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_quantizer(self.quantizer)

    def make_start(self, request: StartRequest) -> Start:
        weight = request.weight
        if not all_finite(weight):
            raise ValueError("weight holds NaN or Inf")
        start = self._best(request, weight, self._quantized(weight))
        return Start(start.lora_A, start.lora_B, rewritten=True)

    def take_out_(self, weight: Tensor, start: Start, scaling: float) -> None:
        """weight ← q(weight) in place."""
        weight.copy_(self._quantized(weight))

    def _quantized(self, weight: Tensor) -> Tensor:
        return quantized(weight, self.quantizer).to(weight.dtype)

    def toward(self, original: Callable[[], Tensor]) -> Initializer:
        """The initializer for a base Q that is already quantized; `original()` returns the weight W
        [out, in] from which Q was made. Q does not change, and `quantizer` has no effect.
        """
        return _QuantizedBaseQERA(original, self.exact, self.method, self.seed)


@dataclass(frozen=True)
class _QuantizedBaseQERA(_QERA):
    """QERA's start for W = `original()` [out, in] and the weight in the request, dequantized, as Q.
    Nothing is subtracted.
    """

    original: Callable[[], Tensor]
    exact: bool = True
    method: str = "randomized"
    seed: int = 0
    changes_base = False
    reads_weight = True

    def make_start(self, request: StartRequest) -> Start:
        return self._best(request, original_of(self.original, request.weight), request.weight)

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        if len(requests) != 1:
            raise ValueError(f"one original weight makes one start, not {len(requests)}")
        return super().make_starts(requests)


def _refuse_noise(S: Tensor, rows: Tensor, found: Activations) -> None:
    """Raise if a value S² = z R zᵀ, where z is one of the `rows` [r, m] of Uᵀ(W − Q), is no larger
    than its error from the rounding of R's entries: A would be z divided by noise.
    """
    diagonal = found.squares.double().to(rows.device) / found.count
    # An entry R_jk has an error of about eps · √(R_jj R_kk), independent of x's units.
    error = 4 * math.sqrt(rows.shape[1]) * torch.finfo(found.squares.dtype).eps
    rank = int(torch.gt(S.square(), error * (rows.square() @ diagonal)).sum())
    if rank < len(S):
        raise ValueError(
            f"{_ON_INPUTS} has numerical rank {rank}, less than r = {len(S)}: QERA does not use "
            f"the other {len(S) - rank} components; capture inputs of more directions, or take "
            f"r <= {rank}"
        )


def _times_diagonal(error: Tensor, found: Activations) -> Tensor:
    """The error [n, m] times the square root of R's diagonal."""
    mean = found.squares.double().to(error.device) / found.count
    return error * mean.sqrt()


register_initializer("qera", QERA)
