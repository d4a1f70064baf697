"""`Activations`, the statistics of a layer's input that `capture_activations` measures, and
`ActivationSums`, which adds up rows of that input.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..._utils.checks import FLOATS, all_finite, factor_dtype
from ...ops import svd
from ..base import Initializer
from ..start import StartRequest
from .sketch import FrequentDirections


@dataclass(frozen=True, eq=False)
class Activations:
    """Sums over the N rows x [in] that a layer has received as input. Layers that share an input
    share one object. Float32, or float64 for a float64 input.

    Attributes:
        count: N, the number of rows.
        total: Σ x [in].
        squares: Σ x² [in].
        gram: Σ xᵀx [in, in]; None if a sketch replaces it.
        sketch: [k, in], the rows of a `FrequentDirections` sketch S; else None.
        error: the error of the sketch: 0 ⪯ Σ xᵀx − SᵀS ⪯ `error`·I.

    """

    count: int
    total: Tensor
    squares: Tensor
    gram: Tensor | None = None
    sketch: Tensor | None = None
    error: float = 0.0
    _axes: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(rows: Tensor, sketch: int | None = None) -> Activations:
        """The sums over inputs [..., in]. With `sketch`, a sketch of that many rows replaces the
        Gram matrix.
        """
        sums = ActivationSums(rows.shape[-1], factor_dtype(rows.dtype), rows.device, sketch)
        sums.add(rows.detach().reshape(-1, rows.shape[-1]))
        return sums.result()

    @property
    def in_features(self) -> int:
        """The number of features of the input."""
        return len(self.total)

    def whole_gram(self) -> Tensor:
        """Σ xᵀx [in, in]; ValueError if a sketch replaces it."""
        if self.gram is None:
            raise ValueError("there is a sketch instead of Σ xᵀx")
        return self.gram

    def moment(self) -> Tensor:
        """Σ xᵀx / N [in, in] in float64."""
        return self.whole_gram().double() / self.count

    def variance(self) -> Tensor:
        """Σ ‖x − mean‖² (0-dim float64): the variance of all directions together, times N."""
        mean = self.total.double() / self.count
        return (self.squares.double().sum() - self.count * mean.square().sum()).clamp(min=0)

    def axes(self, r: int) -> tuple[Tensor, Tensor]:
        """The first r principal axes [r, in] of the inputs, and Σ ⟨x − mean, axis⟩² of each [r], in
        float64: the r largest eigenvectors and eigenvalues of Σ xᵀx − N · meanᵀmean. In each axis,
        the entry of largest magnitude is positive. A sketch's values are too small by at most
        `error`. The axes are computed once, for the largest r requested so far.
        """
        known = max(self._axes, default=0)
        if known < r:
            self._axes.clear()
            self._axes[r] = self._from_gram(r) if self.sketch is None else self._from_sketch(r)
            known = r
        axes, values = self._axes[known]
        return axes[:r], values[:r]

    def _from_gram(self, r: int) -> tuple[Tensor, Tensor]:
        mean = self.total.double() / self.count
        centered = torch.addr(self.moment(), mean, mean, alpha=-1).mul_(self.count)
        axes, values, _, _ = svd.truncated(centered, r)  # symmetric and positive
        return axes.mT, values

    def _from_sketch(self, r: int) -> tuple[Tensor, Tensor]:
        """From the span of the sketch's rows and the mean, outside which the matrix is zero."""
        if self.sketch is None:
            raise ValueError("there is neither Σ xᵀx nor a sketch")
        if r > len(self.sketch):
            raise ValueError(
                f"the sketch has {len(self.sketch)} rows, too few for {r} principal axes: capture "
                f"with sketch={2 * r} or more"
            )
        mean = self.total.double() * self.count**-0.5
        basis, parts = torch.linalg.qr(torch.cat([self.sketch.double(), mean[None]]).mT)
        rows, shift = parts[:, :-1], parts[:, -1]
        values, vectors = torch.linalg.eigh(rows @ rows.mT - torch.outer(shift, shift))
        axes = (basis @ vectors.flip(1)[:, :r]).mT
        pivot = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        return axes * pivot.sign(), values.flip(0)[:r].clamp(min=0)


class ActivationSums:
    """Adds up the rows of an input in constant memory."""

    def __init__(
        self, cols: int, dtype: torch.dtype, device: torch.device | str, sketch: int | None
    ) -> None:
        self.count = 0
        self.device = torch.device(device)
        # Σ xᵀx or Σ x² above Σ x in one tensor, so that processes add both in one collective.
        rows = cols if sketch is None else 1
        self.moments = torch.zeros(rows + 1, cols, dtype=dtype, device=device)
        self.sketch = None
        if sketch is not None:
            self.sketch = FrequentDirections(sketch, cols, dtype, self.device)

    def add(self, rows: Tensor) -> None:
        """Adds rows [n, in] of any float dtype."""
        rows = rows.to(self.moments.dtype)
        total = rows.sum(0).to(self.device)
        self.count += len(rows)
        self.moments[-1] += total
        if self.sketch is not None:
            self.moments[0] += rows.square().sum(0).to(self.device)
            self.sketch.add(rows.to(self.device))
        elif rows.device == self.device:
            self.moments[:-1].addmm_(rows.mT, rows)
        else:
            self.moments[:-1] += (rows.mT @ rows).to(self.device)

    def copy(self) -> ActivationSums:
        """An independent copy of the sums."""
        other = object.__new__(ActivationSums)
        other.count, other.device, other.moments = self.count, self.device, self.moments.clone()
        other.sketch = None if self.sketch is None else self.sketch.copy()
        return other

    def result(self) -> Activations:
        """The sums so far; the Gram matrix is not copied."""
        total, rest = self.moments[-1], self.moments[:-1]
        if self.sketch is None:
            return Activations(self.count, total, rest.diagonal(), gram=rest)
        rows = self.sketch.rows()
        return Activations(self.count, total, rest[0], sketch=rows, error=self.sketch.error)


class FromActivations(Initializer):
    """Starts that are computed from the inputs of the layer."""

    needs_activations = True
    grows_with_scaling = False

    def for_embedding(self) -> Initializer:
        raise ValueError(
            f"{type(self).__name__} starts from the inputs of a linear layer, and an embedding's "
            "are token ids: take another start for it, or leave it out with exclude_modules"
        )


def measured(request: StartRequest, method: str, *, needs_gram: bool = True) -> Activations:
    """The request's activations, checked. They may be on another device than W.

    Raises:
        ValueError: there are none, they belong to another layer, or `method` cannot use them.
        TypeError: they are not `Activations`.

    """
    found = request.activations
    if found is None:
        raise ValueError(
            f"{method} starts from the inputs of the layer: give activations=, made by "
            "capture_activations or Activations.of(x)"
        )
    if not isinstance(found, Activations):
        raise TypeError(f"activations must be an Activations, got {type(found).__name__}")
    cols = request.shape[1]
    if found.in_features != cols:
        raise ValueError(
            f"activations are of inputs [{found.in_features}], the weight's are [{cols}]: {method} "
            "needs those of this layer"
        )
    if found.total.is_meta:
        raise ValueError(f"{method} reads numbers: activations cannot be on meta")
    if needs_gram and found.gram is None:
        raise ValueError(
            f"{method} needs all of Σ xᵀx, and activations have a sketch of it: capture them "
            "without sketch="
        )
    _check_values(found, method)
    return found


def _check_values(found: Activations, method: str) -> None:
    tensors = [found.total, found.squares, found.gram, found.sketch]
    present = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.dtype in FLOATS for tensor in present):
        raise TypeError(f"activations must be real floats, got {present[0].dtype}")
    if not all(map(all_finite, present)):
        raise ValueError(
            "activations hold NaN or Inf: float16 overflows easily; run the model in bfloat16"
        )
    if not bool(found.squares.any()):
        raise ValueError(
            f"the inputs of the layer are all zero, so {method} has no direction to start in: "
            "capture other batches, or leave the layer out"
        )
