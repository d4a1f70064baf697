"""Shared by the operators that factorize weights: checks of a list, exact SVDs, fixed signs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._utils.checks import check_rank, check_same_device, check_weight, factor_dtype


def check_matrices(weights: list[Tensor], rank: int) -> None:
    """Raise unless these are matrices of one shape, dtype and device, for which `rank` is valid."""
    if not weights:
        raise ValueError("there is no weight to factorize: the list or the batch is empty")
    for name, weight in zip(names(weights), weights, strict=True):
        check_weight(weight, name)
        for what in ("shape", "dtype"):
            value, first = getattr(weight, what), getattr(weights[0], what)
            if value != first:
                value, first = (list(v) if what == "shape" else v for v in (value, first))
                raise ValueError(
                    f"{name} has {what} {value}, weights[0] has {first}; call once per {what}"
                )
        rows, cols = weight.shape
        if rows == 0 or cols == 0:
            raise ValueError(f"{name} is empty, shape [{rows}, {cols}]")
    check_same_device(weights)
    rows, cols = weights[0].shape
    check_rank(rank, rows, cols, names(weights)[0])


def refuse_not_finite(weights: list[Tensor]) -> None:
    """Raise if a weight holds NaN or Inf, or is so large that its σ may overflow their dtype.

    One pass over all weights, and one wait for the device.
    """
    dtype = factor_dtype(weights[0].dtype)
    sums = torch.ops.lora.frobenius_stats(weights)[:, 1].tolist()
    for name, weight, value in zip(names(weights), weights, sums, strict=True):
        if math.isfinite(value):
            if math.sqrt(value) > torch.finfo(dtype).max:
                raise ValueError(
                    f"the norm of {name} overflows {dtype}, and its singular values may: scale it "
                    "down by a power of two first"
                )
        # The squares of float64 entries beyond 1e154 overflow the sum.
        elif dtype != torch.float64 or not bool(weight.isfinite().all()):
            raise ValueError(f"{name} holds NaN or Inf")


def exact_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """LAPACK's or cuSOLVER's thin SVD [n, k], [k], [k, m] of one weight, σ descending, with fixed
    signs; in float32 for 16-bit weights.
    """
    U, S, Vh = torch.linalg.svd(weight.to(factor_dtype(weight.dtype)), full_matrices=False)
    sign = pivot_sign(U)
    return U * sign, S, Vh * sign[:, None]


def pivot_sign(U: Tensor) -> Tensor:
    """The sign, ±1, of the entry of largest magnitude in each column of U [n, r], or of the first
    such entry if there are several: [r].
    """
    pivot = U.gather(0, U.abs().argmax(0, keepdim=True))[0]
    return torch.where(pivot < 0, -1.0, 1.0).to(U.dtype)


def stacked(factors: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The tuples of all weights stacked into one, along a new leading dimension."""
    return tuple(torch.stack(column) for column in zip(*factors, strict=True))


def empty_svd(weights: list[Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized U [k, n, rank], S [k, rank] and Vh [k, rank, m], for fakes."""
    (rows, cols), k = weights[0].shape, len(weights)
    shapes = ((k, rows, rank), (k, rank), (k, rank, cols))
    U, S, Vh = (weights[0].new_empty(s, dtype=factor_dtype(weights[0].dtype)) for s in shapes)
    return U, S, Vh


def names(weights: list[Tensor]) -> list[str]:
    """The names that errors use for the weights."""
    return ["weight"] if len(weights) == 1 else [f"weights[{k}]" for k in range(len(weights))]
