"""`Spectrum`: eigendecompositions of many r × r Gram matrices by one call, and the matrices that
rules compute from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Symmetric positive semidefinite matrices, `vectors` diag(`values`) `vectors`ᵀ.

    Attributes:
        values: float64 [N, r], not negative.
        vectors: float64 [N, r, r].
        valid: bool [N], False where a matrix has an entry that is not finite.
        eps: the rounding unit of the factors that the matrices were made of.

    """

    values: Tensor
    vectors: Tensor
    valid: Tensor
    eps: float

    @staticmethod
    def of(grams: Tensor, eps: float) -> Spectrum:
        """Decomposes `grams` float64 [N, r, r] by one call. Entries that are not finite raise no
        error.
        """
        valid = grams.isfinite().all(-1).all(-1)
        unit = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
        values, vectors = torch.linalg.eigh(torch.where(valid[:, None, None], grams, unit))
        return Spectrum(values.clamp_min(0), vectors, valid, eps)

    def inverse(self, damping: float) -> Tensor:
        """(M + `damping` I)⁻¹ [N, r, r]; NaN where M is not finite."""
        return self._with(1 / (self.values + damping))

    def pseudo_inverse(self, damping: float) -> Tensor:
        """(M + `damping` I)⁺ [N, r, r] as `torch.linalg.pinv` computes it for matrices in the
        factors' dtype: 0 for eigenvalues of at most r · eps times the largest. NaN where M is not
        finite.
        """
        shifted = self.values + damping
        return self._with(torch.where(self._counts(shifted), 1 / shifted, 0.0))

    def sylvester(self, other: Spectrum, right: Tensor) -> Tensor:
        """X [N, r, r] with M X + X N = `right`, where N are the matrices of `other`; 0 in the
        directions in which the eigenvalues of both M and N are only rounding errors.
        """
        sums = self.values[:, :, None] + other.values[:, None, :]
        counts = self._counts(sums.flatten(1)).view_as(sums)
        rotated = self.vectors.mT @ right @ other.vectors
        return self.vectors @ torch.where(counts, rotated / sums, 0.0) @ other.vectors.mT

    def _counts(self, values: Tensor) -> Tensor:
        """Which of the `values` [N, k] are larger than rounding errors of the largest value."""
        rank = self.values.shape[-1]
        return values > rank * self.eps * values.amax(-1, keepdim=True)

    def _with(self, values: Tensor) -> Tensor:
        values = torch.where(self.valid[:, None], values, torch.nan)
        return (self.vectors * values[:, None, :]) @ self.vectors.mT
