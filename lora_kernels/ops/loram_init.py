"""`lora::loram_init` and `lora::loram_init_foreach`: the LoRAM start (arXiv 2507.06558)."""

from __future__ import annotations

import functools
import math
from operator import attrgetter

import torch

from .._utils.checks import (
    FLOATS,
    check_finite,
    check_rank,
    check_same_device,
    check_weight,
    check_writable,
    factor_dtype,
)
from ._backends.library import define_composite, define_kernel, define_mutating_kernel
from .dst_basis import dst_basis_ref
from .frobenius_stats import frobenius_stats_ref
from .subtract_dst import subtract_dst_ref


@functools.lru_cache(maxsize=4096)
def log_gain(rank: int, rows: int, cols: int) -> float:
    """Q[r] = ln r / ln min(n, m) (LoRAM, eq. 9), with Q[1] taken as Q[2].

    ln 1 = 0 would start A and B at zero, where both gradients vanish: rank 1 would never train.
    """
    full = min(rows, cols)
    return 1.0 if full <= 2 else math.log(max(rank, 2)) / math.log(full)


BETA_BITS = 41


def shortened(value: torch.Tensor, dtype: torch.dtype, bits: int = BETA_BITS) -> torch.Tensor:
    """A float64 tensor rounded to `bits` significant bits, unless the weight's `dtype` is float64.

    The last bit of a sum depends on the order of its terms, and therefore on how a weight is
    sharded: a float64 β differs for a third of the weights, a β of 41 bits for one in 10,000. A and
    B, which are float32, lose nothing.
    """
    if dtype == torch.float64:
        return value
    half = 1 << (52 - bits)
    return ((value.view(torch.int64) + half) & -2 * half).view(torch.float64)


def check_distinct(weights: list[torch.Tensor]) -> None:
    """Raise if a weight is in the list twice: its start would be subtracted twice."""
    addresses = [weight.data_ptr() for weight in weights]
    if len(set(addresses)) == len(weights):
        return
    seen: dict[int, int] = {}
    for k, address in enumerate(addresses):
        first = seen.setdefault(address, k)
        if first != k:
            raise ValueError(
                f"loram_init: weights {first} and {k} share memory (tied?); pass it only once"
            )


def refuse_unfit(
    weights: list[torch.Tensor], sums_of_squares: list[float], rank: int, scaling: float
) -> None:
    """Raise if a weight's magnitude is zero or not finite, or if its residual could overflow."""
    for k, value in enumerate(sums_of_squares):
        if not math.isfinite(value):
            raise ValueError(
                f"loram_init: weight {k} holds NaN or Inf (or its norm overflows float64); "
                "no weight was changed"
            )
        if value == 0:
            raise ValueError(
                f"loram_init: weight {k} is zero, so its magnitude gives no scale; "
                "no weight was changed"
            )
    for k, (weight, value) in enumerate(zip(weights, sums_of_squares, strict=True)):
        coefficient = scaling * math.sqrt(value * log_gain(rank, *weight.shape) / rank)
        if not _residual_fits(weight, math.sqrt(value), coefficient, rank):
            raise ValueError(
                f"loram_init: with scaling {scaling} the residual of weight {k} could overflow "
                f"{weight.dtype}; no weight was changed"
            )


@functools.lru_cache(maxsize=4096)
def largest_sum(rank: int, scaling: float, dtype: torch.dtype, shape: tuple[int, int]) -> float:
    """A sum of squares up to which the residual of every weight of this shape fits.

    Weights below this bound skip `refuse_unfit`, which costs time per weight while the device
    waits.
    """
    rows, cols = shape
    share = 2 * rank / math.sqrt((rows + 1) * (cols + 1))
    times_norm = 1 + abs(scaling) * math.sqrt(log_gain(rank, rows, cols) / rank) * share
    norm = torch.finfo(dtype).max / times_norm
    # 0.99 covers the rounding errors of this function.
    return min(0.99 * norm * norm, torch.finfo(torch.float64).max)


def _residual_fits(weight: torch.Tensor, norm: float, coefficient: float, rank: int) -> bool:
    """Each entry of the subtracted product is at most |coefficient| 2r / √((n+1)(m+1))."""
    rows, cols = weight.shape
    bound = abs(coefficient) * 2 * rank / math.sqrt((rows + 1) * (cols + 1))
    limit = torch.finfo(weight.dtype).max
    return bound + norm <= limit or bound + float(weight.abs().max()) <= limit


def loram_init_ref(
    weights: list[torch.Tensor],
    lora_A: list[torch.Tensor],
    lora_B: list[torch.Tensor],
    beta: torch.Tensor,
    rank: int,
    scaling: float,
    check: bool,
    stats: torch.Tensor | None = None,
) -> None:
    """`stats` are the weights' `frobenius_stats`, if already known."""
    check_distinct(weights)
    sum_of_squares = (frobenius_stats_ref(weights) if stats is None else stats)[:, 1]
    if check:
        refuse_unfit(weights, sum_of_squares.tolist(), rank, scaling)
    for k, weight in enumerate(weights):
        rows, cols = weight.shape
        squared = torch.sqrt(sum_of_squares[k] * log_gain(rank, rows, cols) / rank)
        beta[k] = shortened(torch.sqrt(squared), weight.dtype)
        dst_basis_ref(lora_A[k].T, cols, 0, beta[k])
        dst_basis_ref(lora_B[k], rows, 0, beta[k])
        subtract_dst_ref(weight, scaling * beta[k] ** 2, rank, rows, cols, 0, 0)


def empty_factors_ref(
    weights: list[torch.Tensor], rank: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Uninitialized A [rank, m] and B [n, rank] for each weight [n, m], each with its own memory.

    C++ allocates 448 of them in a third of this time.
    """
    lora_A, lora_B = [], []
    for weight in weights:
        rows, cols = weight.shape
        dtype, device = factor_dtype(weight.dtype), weight.device
        lora_A.append(torch.empty(rank, cols, dtype=dtype, device=device))
        lora_B.append(torch.empty(rows, rank, dtype=dtype, device=device))
    return lora_A, lora_B


_memory = attrgetter("dtype", "ndim", "layout")
_kind = attrgetter("dtype", "shape", "layout")


def _are_readable(weights: list[torch.Tensor]) -> bool:
    """Whether kernels can read these weights; if not, `check_weight` says why. 0.05 ms for 224."""
    return all(
        dtype in FLOATS and ndim == 2 and layout == torch.strided
        for dtype, ndim, layout in set(map(_memory, weights))
    )


def _are_fit(weights: list[torch.Tensor], rank: int) -> bool:
    """Whether no check in `_check_weights` would raise; False also if that cannot be decided
    quickly. Fast, because the device may be waiting: a model has only a handful of kinds of
    weights.
    """
    try:
        kinds = set(map(_kind, weights))
    except TypeError:  # symbolic sizes cannot be hashed
        return False
    return all(
        dtype in FLOATS and len(shape) == 2 and 1 <= rank <= min(shape) and layout == torch.strided
        for dtype, shape, layout in kinds
    ) and all(map(torch.Tensor.is_contiguous, weights))


def _check_weights(weights: list[torch.Tensor], rank: int) -> None:
    if _are_fit(weights, rank):
        return
    for k, weight in enumerate(weights):
        name = f"weights[{k}]"
        check_weight(weight, name)
        check_writable(weight, name)
        rows, cols = weight.shape
        check_rank(rank, rows, cols, name)


def loram_init_foreach(
    weights: list[torch.Tensor], rank: int, scaling: float = 1.0, *, check: bool = True
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    check_finite(scaling, "scaling")
    if not weights:
        return [], [], torch.empty(0, dtype=torch.float64)
    check_same_device(weights)
    device = weights[0].device
    with torch.no_grad():
        # Launched before the other checks, so that the GPU works while the host runs them.
        if not _are_readable(weights):
            _check_weights(weights, rank)
        stats = torch.ops.lora._frobenius_stats(weights)
        _check_weights(weights, rank)
        lora_A, lora_B = torch.ops.lora._empty_factors(weights, rank)
        beta = torch.empty(len(weights), dtype=torch.float64, device=device)
        torch.ops.lora._loram_init_(weights, lora_A, lora_B, beta, rank, scaling, check, stats)
    return lora_A, lora_B, beta


def loram_init(
    weight: torch.Tensor, rank: int, scaling: float = 1.0, *, check: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lora_A, lora_B, beta = loram_init_foreach([weight], rank, scaling, check=check)
    return lora_A[0], lora_B[0], beta[0]


define_kernel(
    "_empty_factors(Tensor[] weights, SymInt rank) -> (Tensor[] lora_A, Tensor[] lora_B)",
    empty_factors_ref,
    empty_factors_ref,
)
define_mutating_kernel(
    "_loram_init_(Tensor(a!)[] weights, Tensor(b!)[] lora_A, Tensor(c!)[] lora_B, Tensor(d!) beta, "
    "SymInt rank, float scaling, bool check, Tensor? stats=None) -> ()",
    loram_init_ref,
    lambda weights, lora_A, lora_B, beta, *rest: [*weights, *lora_A, *lora_B, beta],
)
define_composite(
    "loram_init(Tensor(a!) weight, SymInt rank, float scaling=1.0, *, bool check=True) "
    "-> (Tensor lora_A, Tensor lora_B, Tensor beta)",
    loram_init,
)
define_composite(
    "loram_init_foreach(Tensor(a!)[] weights, SymInt rank, float scaling=1.0, *, bool check=True) "
    "-> (Tensor[] lora_A, Tensor[] lora_B, Tensor beta)",
    loram_init_foreach,
)
