"""CorDA: W's triplets in the metric of the layer's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils.checks import as_integer, check_positive
from ..._utils.errors import unknown_name
from ...ops import svd
from ..base import register_initializer
from ..spectral.triplets import (
    refuse_missing_rank,
    refuse_zero_values,
    refuse_zero_weights,
    smallest_triplets,
)
from ..start import Start, StartRequest
from .activations import Activations, FromActivations, measured

_METHODS = ("ipm", "kpm")
_DAMPING = 0.01
# The smallest values of W C̃ are close together: without this tolerance, BA of a real weight is off
# by 2 %.
_SETTLED = 1e-8


@dataclass(frozen=True)
class CorDA(FromActivations):
    """B = U√(S / s), A = √(S / s)·VᵀC̃⁻¹ of r triplets of W C̃ = USVᵀ, where C̃ = C +
    0.01·mean(diag C)·I and C = Σ xᵀx / N of the layer's inputs.

    Yang et al., arXiv 2406.05223; PEFT's `corda.py`, which follows the authors' code.
    `corda_method`, named as in PEFT, is "ipm", the instruction-previewed mode with the r largest
    triplets, or "kpm", the knowledge-preserved mode with the r smallest, in descending order. W
    changes (W − s·BA).

    No inverse is computed: VᵀC̃⁻¹ = S⁻¹UᵀW C̃ C̃⁻¹ = S⁻¹UᵀW. So A = UᵀW / √(S s), and s·BA = U UᵀW.

    Both codes double the damping until ‖C̃C̃⁻¹ − I‖ < 0.05 for the inverse that they compute. C̃ is
    positive definite, and its condition number is at most 1 + 100 m, because no eigenvalue of C
    exceeds C's trace, m·mean(diag C). So only float32's rounding could miss that bound; here the
    arithmetic is float64, in which 0.01 meets it. Where PEFT doubles the damping, its start
    differs.

    Both codes divide the inputs of each batch by `|max x|`, and PEFT divides the sum by the number
    of batches, not of inputs. Scaling C by c scales B by √c and A by 1/√c; BA does not change.

    Cost: a product of W [n, m] and C̃ in float64 and a truncated SVD of it, like PiSSA's ("ipm") or
    MiLoRA's ("kpm"); `method="exact"` a full SVD. ValueError if W holds NaN or Inf or has a rank
    less than r ("ipm"), or if one of the r smallest values is zero ("kpm").
    """

    corda_method: str = "ipm"
    method: str = "randomized"
    seed: int = 0
    changes_base = True
    reads_weight = True

    def __post_init__(self) -> None:
        if self.corda_method not in _METHODS:
            raise unknown_name("corda_method", self.corda_method, _METHODS)
        svd.check_options(self.method)
        as_integer(self.seed, "seed")

    def make_starts(self, requests: Sequence[StartRequest]) -> list[Start]:
        return [self.make_start(request) for request in requests]

    def make_start(self, request: StartRequest) -> Start:
        found = measured(request, "CorDA")
        check_positive(request.scaling, "scaling")
        weight = request.weight.double()
        refuse_zero_weights([weight], "CorDA")
        U, S = self._triplets(weight @ _damped(found).to(weight.device), request.r)
        rows = U.mT @ weight
        if self.corda_method == "ipm":
            refuse_missing_rank(rows, request, "weight", "CorDA")
        root = (S * request.scaling).sqrt()
        lora_A, lora_B = rows / root[:, None], U * (root / request.scaling)
        return Start(lora_A.to(request.factor_dtype), lora_B.to(request.factor_dtype))

    def _triplets(self, product: Tensor, r: int) -> tuple[Tensor, Tensor]:
        """U [n, r] and S [r] of W C̃."""
        if self.corda_method == "ipm":
            U, S, _, _ = svd.truncated(product, r, self.method, seed=self.seed)
            return U, S
        found = _smallest(product, r, self.seed) if self.method == "randomized" else None
        if found is None:
            U, S, _ = smallest_triplets([product], r, "exact", self.seed)
            found = U[0], S[0]
        largest = [float(torch.linalg.vector_norm(product, torch.inf))]
        refuse_zero_values(found[1][None], [product], largest, "CorDA")
        return found


def _smallest(product: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor] | None:
    """U [n, r] and S [r] of the r smallest triplets, σ descending; None if the matrix is singular.

    These are the largest triplets of R⁻¹, where R is from a QR of the product or of its transpose:
    R has the same σ, and its condition number is not squared.
    """
    rows, cols = product.shape
    is_tall = rows > cols
    R = torch.linalg.qr(product if is_tall else product.mT, mode="r").R
    identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
    inverse = torch.linalg.solve_triangular(R, identity, upper=True)
    if not bool(inverse.isfinite().all()):
        return None
    # R = leftᵀ diag(1 / values) rightᵀ.
    right, values, left, _ = svd.truncated(inverse, r, tol=_SETTLED, seed=seed)
    S = values.reciprocal().flip(0)
    if not is_tall:
        return right.flip(1), S
    U = torch.linalg.qr(product @ torch.linalg.solve_triangular(R, left.mT, upper=True)).Q
    return U.flip(1), S


def _damped(found: Activations) -> Tensor:
    """C̃ [m, m] in float64."""
    moment = found.moment()
    diagonal = moment.diagonal()
    diagonal += _DAMPING * diagonal.mean()
    return moment


register_initializer("corda", CorDA)
