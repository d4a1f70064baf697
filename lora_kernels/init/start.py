"""`StartRequest`, an initializer's input; `Start`, the initial factors that it returns; and how
these are subtracted from a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import all_finite, factor_dtype


@dataclass(frozen=True, eq=False)
class StartRequest:
    """The weight W [out, in] that a start is computed for, which is only read, and the rank r.

    `scaling` is the layer's s, for starts that are divided by it; `gradient` [out, in] is the loss
    gradient of W, for starts computed from it; `activations` are statistics of the layer's input,
    for starts that need them.

    `sums` are the sum and the sum of squares of W's entries [2] in float64, if known. They are
    always given if W is sharded; `weight` then has W's shape, dtype and device, but no values.
    """

    weight: Tensor
    r: int
    scaling: float = 1.0
    gradient: Tensor | None = None
    sums: Tensor | None = None
    activations: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, cols = self.weight.shape
        return rows, cols

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of A and B: float32, or float64 for a float64 weight."""
        return factor_dtype(self.weight.dtype)

    def stats(self) -> Tensor:
        """The sum and the sum of squares of W's entries [2], float64."""
        return stats([self])[0]

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized factor, in `factor_dtype` on the weight's device."""
        return torch.empty(*shape, dtype=self.factor_dtype, device=self.weight.device)


def batched(requests: Sequence[StartRequest]) -> tuple[list[Tensor], int, float]:
    """The weights of requests that share r and scaling, and these two values."""
    if not requests:
        raise ValueError("there is no weight to make a start for")
    first = requests[0]
    if any((other.r, other.scaling) != (first.r, first.scaling) for other in requests):
        raise ValueError("starts that are made together need the same r and the same scaling")
    return [request.weight for request in requests], first.r, first.scaling


def stats(requests: Sequence[StartRequest]) -> Tensor:
    """The sum and the sum of squares of each request's W [requests, 2], float64: those that are
    known, or all of them in one pass.
    """
    known = [request.sums for request in requests if request.sums is not None]
    if len(known) == len(requests):
        return torch.stack(known)
    found: Tensor = torch.ops.lora.frobenius_stats([request.weight for request in requests])
    return found


@dataclass(frozen=True)
class Start:
    """The initial factors of an adapter.

    Attributes:
        lora_A: [r, in].
        lora_B: [out, r].
        beta: β (0-dim float64) if A and B are β times DST bases. This one number is their recipe:
            they can be recomputed from it.
        lora_R: [r, r] if A and B are frozen and only this matrix between them trains: the layer
            multiplies B R A.
        lora_diag: [r], λ, if a diagonal between A and B trains too: the layer multiplies
            B diag(λ) A.
        taken: A₀ [r, in] and B₀ [out, r], whose product s · B₀A₀ is subtracted from W, if these are
            not A and B themselves.
        weight_norm: ‖W‖_F (0-dim float64) if the initializer has computed it anyway.
        rewritten: whether the base of this start is not W − s · B₀A₀ but has new values (LoftQ's
            quantized weight).
        earlier: the start of the previous step, from which those new values are computed.

    """

    lora_A: Tensor
    lora_B: Tensor
    beta: Tensor | None = None
    lora_R: Tensor | None = None
    weight_norm: Tensor | None = None
    rewritten: bool = False
    earlier: Start | None = None
    lora_diag: Tensor | None = None
    taken: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def stacked(starts: Sequence[Start]) -> Start:
        """The starts of several experts as one, whose tensors get a leading dimension."""
        first = starts[0]

        def stack(tensors: list[Tensor | None]) -> Tensor | None:
            found = [tensor for tensor in tensors if tensor is not None]
            return torch.stack(found) if found else None

        earlier = [start.earlier for start in starts if start.earlier is not None]
        return Start(
            torch.stack([start.lora_A for start in starts]),
            torch.stack([start.lora_B for start in starts]),
            stack([start.beta for start in starts]),
            stack([start.lora_R for start in starts]),
            stack([start.weight_norm for start in starts]),
            first.rewritten,
            Start.stacked(earlier) if earlier else None,
            stack([start.lora_diag for start in starts]),
            _stacked_pairs([start.taken for start in starts if start.taken is not None]),
        )

    def expert(self, index: int) -> Start:
        """One of the starts that were `stacked`; its tensors are views."""

        def own(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[index]

        return Start(
            self.lora_A[index],
            self.lora_B[index],
            own(self.beta),
            own(self.lora_R),
            own(self.weight_norm),
            self.rewritten,
            None if self.earlier is None else self.earlier.expert(index),
            own(self.lora_diag),
            None if self.taken is None else (self.taken[0][index], self.taken[1][index]),
        )

    def right(self) -> Tensor:
        """A, or R A if there is an R, or diag(λ) A, [r, in] in float32 or wider. The product is
        `lora_B` times this matrix.
        """
        work = torch.promote_types(self.lora_A.dtype, torch.float32)
        lora_A = self.lora_A.to(work)
        if self.lora_diag is not None:
            return self.lora_diag.to(work)[..., None] * lora_A
        return lora_A if self.lora_R is None else self.lora_R.to(work) @ lora_A

    def subtracted(self) -> tuple[Tensor, Tensor]:
        """A₀ [r, in] and B₀ [out, r], whose product s · B₀A₀ is subtracted from W if the start
        changes the base: `taken`, else the initial values of A, R and B.
        """
        return self.taken or (self.right(), self.lora_B)


def _stacked_pairs(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    if not pairs:
        return None
    rights, lefts = zip(*pairs, strict=True)
    return torch.stack(rights), torch.stack(lefts)


def checked(start: Start, weight: Tensor, r: int) -> Start:
    """The start with its factors copied, in the dtype that goes with `weight`.

    Raises:
        ValueError: a factor does not fit the weight and the rank, or is not finite.

    """
    rows, cols = weight.shape
    dtype, device = factor_dtype(weight.dtype), weight.device

    def copied(name: str, factor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(factor.shape) != shape:
            raise ValueError(
                f"the initializer returned {name} of shape {list(factor.shape)}; a weight "
                f"[{rows}, {cols}] at rank {r} needs {list(shape)}"
            )
        if not factor.is_meta and not bool(factor.isfinite().all()):
            raise ValueError(f"the initializer returned a {name} that holds NaN or Inf")
        # A copy: the factor may be a view of W or G, expanded, or kept by the initializer.
        return torch.empty(shape, dtype=dtype, device=device).copy_(factor.detach())

    taken = start.taken
    if taken is not None:
        taken = (
            copied("taken A₀", taken[0], (r, cols)),
            copied("taken B₀", taken[1], (rows, r)),
        )
    return replace(
        start,
        lora_A=copied("lora_A", start.lora_A, (r, cols)),
        lora_B=copied("lora_B", start.lora_B, (rows, r)),
        lora_R=None if start.lora_R is None else copied("lora_R", start.lora_R, (r, r)),
        lora_diag=None if start.lora_diag is None else copied("lora_diag", start.lora_diag, (r,)),
        taken=taken,
    )


def checked_stack(starts: Sequence[Start], weights: Sequence[Tensor], r: int) -> Start:
    """The starts of experts as one, whose factors are copies in the dtype that goes with `weights`.

    Raises:
        ValueError: as `checked`, with the number of the expert.

    """
    dtype, device = factor_dtype(weights[0].dtype), weights[0].device
    stack = Start.stacked(starts) if _alike(starts) else None
    rows, cols = weights[0].shape
    shapes = {"lora_A": (r, cols), "lora_B": (rows, r), "lora_R": (r, r), "lora_diag": (r,)}
    factors = [(getattr(stack, name), shape) for name, shape in shapes.items()] if stack else []
    fits = all(
        factor.shape[1:] == shape and (factor.is_meta or all_finite(factor))
        for factor, shape in factors
        if factor is not None
    )
    if stack is None or not fits:
        for e, (start, weight) in enumerate(zip(starts, weights, strict=True)):
            try:
                checked(start, weight, r)
            except ValueError as error:
                raise ValueError(f"expert {e}: {error}") from None
        raise ValueError("the initializer returned starts of different kinds for experts")

    def placed(factor: Tensor) -> Tensor:
        return factor.detach().to(device, dtype)

    return replace(
        stack,
        lora_A=placed(stack.lora_A),
        lora_B=placed(stack.lora_B),
        lora_R=None if stack.lora_R is None else placed(stack.lora_R),
        lora_diag=None if stack.lora_diag is None else placed(stack.lora_diag),
        taken=None if stack.taken is None else (placed(stack.taken[0]), placed(stack.taken[1])),
    )


def _alike(starts: Sequence[Start]) -> bool:
    """Whether the starts can be stacked: all have the same factors, of the same shapes."""

    def kind(start: Start) -> tuple[object, ...]:
        optional = (start.beta, start.lora_R, start.weight_norm, start.lora_diag, start.taken)
        return (start.lora_A.shape, start.lora_B.shape, *(part is None for part in optional))

    return len(set(map(kind, starts))) == 1


def check_residual_fits(
    weight: Tensor,
    start: Start,
    scaling: float,
    largest_entry: Callable[[], Tensor] | None = None,
) -> None:
    """Raise if W holds NaN or Inf, or if W − s·B₀A₀ could overflow. `largest_entry` returns max |W|
    if `weight` has no values.
    """
    room = torch.finfo(weight.dtype).max - abs(scaling) * _largest_entry(start)
    # ‖W‖_F bounds every entry of W; where it is known and small enough, W is not read.
    if start.weight_norm is not None and float(start.weight_norm) <= room:
        return
    read = largest_entry or (lambda: torch.linalg.vector_norm(weight, math.inf))
    largest = float(read())
    if not math.isfinite(largest):
        raise ValueError("weight holds NaN or Inf; it was not changed")
    if largest > room:
        raise ValueError(
            f"with scaling {scaling:g} the residual of weight could overflow {weight.dtype}; "
            "it was not changed"
        )


def _largest_entry(start: Start) -> float:
    """An upper bound on the entries of B₀A₀."""
    if start.beta is not None:
        (r, cols), rows = start.lora_A.shape, start.lora_B.shape[0]
        return float(start.beta) ** 2 * 2 * r / math.sqrt((rows + 1) * (cols + 1))
    right, left = start.subtracted()
    row = torch.linalg.vector_norm(left, dim=1, dtype=torch.float64).max()
    column = torch.linalg.vector_norm(right, dim=0, dtype=torch.float64).max()
    return float(row * column)


ROW_BLOCK = 256  # the rows of W from which a product BA is subtracted at a time


def subtract_start_(weight: Tensor, start: Start, scaling: float) -> None:
    """weight ← weight − scaling · B₀A₀ in place, by the recipe if the start has one."""
    if start.beta is not None:
        subtract_recipe_(weight, start.beta, start.lora_A.shape[0], scaling)
    else:
        subtract_factors_(weight, *start.subtracted(), scaling)


def subtract_starts_(weights: Sequence[Tensor], start: Start, scaling: float) -> None:
    """`subtract_start_` for the weights of experts, whose starts are one `Start.stacked`."""
    if start.beta is not None:
        coefficients = (scaling * start.beta.to(torch.float64) ** 2).to(weights[0].device)
        torch.ops.lora.subtract_dst_foreach_(list(weights), coefficients, start.lora_A.shape[-2])
        return
    done = 0
    try:
        for e, weight in enumerate(weights):
            subtract_start_(weight, start.expert(e), scaling)
            done = e + 1
    except BaseException:  # an interrupt
        for e, weight in enumerate(weights[:done]):
            subtract_start_(weight, start.expert(e), -scaling)
        raise


def subtract_recipe_(weight: Tensor, beta: Tensor, r: int, scaling: float) -> None:
    """weight ← weight − scaling · β²ΦₙΦₘᵀ in place; a negative scaling restores it."""
    coefficient = (scaling * beta.to(torch.float64) ** 2).to(weight.device)
    torch.ops.lora.subtract_dst_(weight, coefficient, r)


def subtract_factors_(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, gain: Tensor | None = None
) -> None:
    """weight ← weight − scaling · BA in place; a negative scaling restores it. With a `gain` [out],
    the rows of the difference are multiplied by it.

    Computed in float32 or wider and rounded once, by blocks of rows, so that no second matrix of
    W's size is allocated.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    lora_A = lora_A.to(work)  # [r, in]
    for begin in range(0, weight.shape[0], ROW_BLOCK):
        block = weight[begin : begin + ROW_BLOCK]  # [block, in]
        rows_B = lora_B[begin : begin + ROW_BLOCK].to(work)  # [block, r]
        changed = torch.addmm(block.to(work), rows_B, lora_A, alpha=-scaling)
        if gain is not None:
            changed = changed * gain[begin : begin + ROW_BLOCK, None]
        block.copy_(changed)
