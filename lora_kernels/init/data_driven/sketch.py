"""Frequent Directions: the Gram matrix of a stream of rows, from a fixed number of rows."""

from __future__ import annotations

import torch
from torch import Tensor


class FrequentDirections:
    """A sketch S, of at most `size` rows, of all added rows X: 0 ⪯ XᵀX − SᵀS ⪯ `error`·I, except
    for rounding.

    Liberty, "Simple and deterministic matrix sketching", KDD 2013 (arXiv 1206.0594), in the form
    with twice the rows between two compressions. Each compression subtracts δ from all σ² of the
    rows in memory, where δ is their σ² number `size` + 1; `error` is the sum of the δ. So, for
    every j ≤ `size`, `error` is at most ‖X − X_j‖²_F / (`size` + 1 − j) with X_j the best
    approximation of rank j (Ghashami et al., SIAM J. Comput. 45, 2016, theorem 1.1). Merged
    sketches keep that bound. Memory: 2 `size` rows.
    """

    def __init__(self, size: int, cols: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.error, self._filled = size, 0.0, 0
        self._buffer = torch.zeros(2 * size, cols, dtype=dtype, device=device)

    def add(self, rows: Tensor) -> None:
        """Adds rows [n, cols]."""
        while len(rows):
            taken = min(len(rows), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken].copy_(rows[:taken])
            self._filled += taken
            rows = rows[taken:]
            if self._filled == len(self._buffer):
                self._compress()

    def merge(self, rows: Tensor, error: float) -> None:
        """Adds the rows of another sketch, and its error."""
        self.add(rows)
        self.error += error

    def rows(self) -> Tensor:
        """S [at most `size`, cols], a copy."""
        self._compress()
        return self._buffer[: self._filled].clone()

    def empty(self) -> FrequentDirections:
        """A new sketch of the same size, dtype and device, without rows."""
        return FrequentDirections(
            self.size, self._buffer.shape[1], self._buffer.dtype, self._buffer.device
        )

    def copy(self) -> FrequentDirections:
        """An independent copy."""
        other = object.__new__(FrequentDirections)
        other.size, other.error, other._filled = self.size, self.error, self._filled
        other._buffer = self._buffer.clone()
        return other

    def _compress(self) -> None:
        """Reduces the sketch to at most `size` orthogonal rows."""
        if self._filled <= self.size:
            return
        rows = self._buffer[: self._filled].double()
        squares, left = torch.linalg.eigh(rows @ rows.mT)  # ascending
        squares, left = squares.flip(0).clamp_(min=0), left.flip(1)
        loss = squares[self.size]
        kept, left = squares[: self.size], left[:, : self.size]
        # A direction that is absent gives 0 / 0, which becomes 0.
        share = ((kept - loss) / kept).nan_to_num_(nan=0.0).sqrt_()
        self._buffer[: self.size].copy_((left * share).mT @ rows)
        self._filled = self.size
        self.error += float(loss)
