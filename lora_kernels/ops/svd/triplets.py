"""The largest or smallest singular triplets of a weight, or of many weights of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._utils.checks import as_integer, is_dtensor
from ..._utils.errors import unknown_name
from ._matrices import check_matrices, exact_svd, refuse_not_finite, stacked
from .minor_svd import minor_triplets

METHODS = ("randomized", "exact")


class TruncatedSVD(NamedTuple):
    """r singular triplets of W [n, m]; a batch of k weights adds a leading k to every shape.

    U has orthonormal columns, Vh has orthonormal rows, and S is not negative; all are float32, or
    float64 for float64 weights. In each column of U the entry of largest magnitude is positive.

    Attributes:
        U: [n, r].
        S: [r].
        Vh: [r, m].
        error: a bound on the largest error of S (0-dim float64; [k] for a batch), relative to the
            value itself or to 1e-7 of the largest, whichever is larger; None without `tol`.

    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    error: Tensor | None = None


@torch.no_grad()
def truncated(
    weight: Tensor | Sequence[Tensor],
    r: int,
    method: str = "randomized",
    *,
    tol: float | None = None,
    subspace: int | None = None,
    seed: int = 0,
) -> TruncatedSVD:
    """The r largest singular triplets, σ descending.

    Args:
        weight: [n, m], a batch [k, n, m], or a list of k weights of one shape, dtype and device;
            float64, float32, bfloat16 or float16, with any strides. Only read.
        r: 1 ≤ r ≤ min(n, m).
        method: "randomized", block Krylov iteration, as good as `torch.svd_lowrank` with niter=16
            on slowly decaying spectra; or "exact", LAPACK's or cuSOLVER's full SVD truncated to r.
        tol: the iteration stops once every σ is known to this relative error (see below). None:
            the dimension of the space is fixed, and the error is not estimated.
        subspace: the dimension of the Krylov space, r ≤ subspace ≤ min(n, m); with `tol`, its
            maximum, so that `error` may exceed `tol`. None: chosen automatically.
        seed: of the random start block. The same seed gives the same bits on one device.

    With `tol`, `error` is a bound, not an estimate: for each weight, with probability more than
    1 - 1e-6 over the seeds, no σ is off by more. The computed σ are never too large (Cauchy's
    interlacing theorem). How much too small they may be follows from the residuals of W on the
    vectors found and from the largest singular value on their complement. A random block of another
    seed bounds that value from above (as Kuczyński and Woźniakowski, SIAM J. Matrix Anal. Appl. 13,
    1992, bound Lanczos's error for a random start; for the block matrix, Lehmann's bounds: Parlett,
    The Symmetric Eigenvalue Problem, chapter 10). Rounding errors are included at their usual size,
    with a margin. Where the bound would need more than two thirds of all dimensions (hundreds of
    values that differ by less than `tol`), the full SVD is computed. `error` is at most `tol`
    unless `subspace` prevents it or rounding is larger: 1.2e-7 of each σ for results in float32.

    Raises:
        ValueError: a value out of range, an unknown method, weights that are empty, that differ in
            shape or dtype, or that hold NaN or Inf; an option of "randomized" given to "exact".
        TypeError: an argument or a weight of the wrong type.

    """
    check_options(method, tol, subspace)
    r, seed = as_integer(r, "r"), as_integer(seed, "seed")
    weights = _as_list(weight)
    if method == "exact":
        return _shaped_as(weight, *_exact(weights, r, lambda U, S, Vh: (U[:, :r], S[:r], Vh[:r])))
    options = (None if subspace is None else int(subspace), seed, tol or 0.0)
    U, S, Vh, error = torch.ops.lora.randomized_svd_foreach(weights, r, *options)
    return _shaped_as(weight, U, S, Vh, error if tol else None)


@torch.no_grad()
def minor(
    weight: Tensor | Sequence[Tensor], r: int, method: str = "randomized", *, seed: int = 0
) -> TruncatedSVD:
    """The r smallest singular triplets, σ ascending.

    `method` is "randomized" (inverse iteration from a random start block) or "exact". Arguments,
    results and errors are those of `truncated`, but there is no bound on the error.
    """
    check_options(method)
    r, seed = as_integer(r, "r"), as_integer(seed, "seed")
    weights = _as_list(weight)
    if method == "exact":
        return _shaped_as(weight, *_exact(weights, r, lambda *usv: minor_triplets(usv, r)))
    return _shaped_as(weight, *torch.ops.lora.minor_svd_foreach(weights, r, seed))


def check_options(method: str, tol: float | None = None, subspace: int | None = None) -> None:
    """Raise for an unknown method, or for an option that the method does not have."""
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if subspace is not None:
        as_integer(subspace, "subspace")
    for name, value in (("tol", tol), ("subspace", subspace)):
        if method == "exact" and value is not None:
            raise ValueError(
                f"{name} is an option of method='randomized': 'exact' does not iterate"
            )


def _as_list(weight: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(weight, Tensor):
        weights = list(weight.unbind()) if weight.dim() == 3 else [weight]
    else:
        weights = list(weight) if isinstance(weight, Sequence) else [weight]
    for one in weights:
        if is_dtensor(one):
            raise TypeError("the weight is a DTensor: give its full_tensor(), on every process")
        if not isinstance(one, Tensor):
            raise TypeError(
                f"weight must be a tensor or a list of tensors, got {type(one).__name__}"
            )
    return weights


def _exact(
    weights: list[Tensor], r: int, select: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    check_matrices(weights, r)
    refuse_not_finite(weights)
    return stacked([select(*exact_svd(weight)) for weight in weights])


def _shaped_as(
    weight: Tensor | Sequence[Tensor], U: Tensor, S: Tensor, Vh: Tensor, error: Tensor | None = None
) -> TruncatedSVD:
    """The result, without its leading dimension if `weight` was a single matrix."""
    if not isinstance(weight, Tensor) or weight.dim() == 3:
        return TruncatedSVD(U, S, Vh, error)
    return TruncatedSVD(U[0], S[0], Vh[0], None if error is None else error[0])
