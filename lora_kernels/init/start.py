"""`Start`: the factors that an adapter starts from, and how they are taken out of a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._utils.checks import factor_dtype


@dataclass(frozen=True)
class Start:
    """Where an adapter starts.

    `lora_A` [r, in] and `lora_B` [out, r]; `beta`, the DST scale if the factors are β times DST
    bases (0-dim float64), from which they can be made again; `lora_R` [r, r] if that is what trains
    between a frozen A and B, which the layer then multiplies as B R A; `weight_norm`, ‖W‖_F (0-dim
    float64) if the initialiser has measured it on the way. LoftQ's base is another than
    W − s · B₀A₀: `rewritten`, and made from the start of the step before, `earlier`.
    """

    lora_A: Tensor
    lora_B: Tensor
    beta: Tensor | None = None
    lora_R: Tensor | None = None
    weight_norm: Tensor | None = None
    rewritten: bool = False
    earlier: Start | None = None

    def right(self) -> Tensor:
        """A, or R A if there is an R, in float32 or wider: s · B₀A₀ is s · `lora_B` times this."""
        work = torch.promote_types(self.lora_A.dtype, torch.float32)
        lora_A = self.lora_A.to(work)
        return lora_A if self.lora_R is None else self.lora_R.to(work) @ lora_A


def checked(start: Start, weight: Tensor, r: int) -> Start:
    """The start with factors of its own, in the dtype that goes with `weight`.

    Raises:
        ValueError: if a factor does not fit the weight and the rank, or is not finite.

    """
    rows, cols = weight.shape
    dtype = factor_dtype(weight.dtype)
    factors = {}
    for name, shape in (("lora_A", (r, cols)), ("lora_B", (rows, r)), ("lora_R", (r, r))):
        factor = getattr(start, name)
        if factor is None and name == "lora_R":
            continue
        if tuple(factor.shape) != shape:
            raise ValueError(
                f"the initialiser gave {name} of shape {list(factor.shape)}; a weight "
                f"[{rows}, {cols}] at rank {r} needs {list(shape)}"
            )
        if not factor.is_meta and not bool(factor.isfinite().all()):
            raise ValueError(f"the initialiser gave a {name} that holds NaN or Inf")
        # A copy: it may be a view of W or G, what the initialiser keeps, or expanded.
        factors[name] = torch.empty(shape, dtype=dtype, device=weight.device).copy_(factor.detach())
    return replace(start, **factors)


def check_residual_fits(weight: Tensor, start: Start, scaling: float) -> None:
    """Raises if W holds NaN or Inf, or if W − s·B₀A₀ could overflow."""
    room = torch.finfo(weight.dtype).max - abs(scaling) * _largest_entry(start)
    # ‖W‖_F is an upper bound that may be known already: no pass over W then.
    if start.weight_norm is not None and float(start.weight_norm) <= room:
        return
    largest = float(torch.linalg.vector_norm(weight, math.inf))
    if not math.isfinite(largest):
        raise ValueError("weight holds NaN or Inf; it was not changed")
    if largest > room:
        raise ValueError(
            f"with scaling {scaling:g} the residual of weight could overflow {weight.dtype}; "
            "it was not changed"
        )


def _largest_entry(start: Start) -> float:
    """An upper bound of the entries of B₀A₀."""
    if start.beta is not None:
        (r, cols), rows = start.lora_A.shape, start.lora_B.shape[0]
        return float(start.beta) ** 2 * 2 * r / math.sqrt((rows + 1) * (cols + 1))
    row = torch.linalg.vector_norm(start.lora_B, dim=1, dtype=torch.float64).max()
    column = torch.linalg.vector_norm(start.right(), dim=0, dtype=torch.float64).max()
    return float(row * column)


_ROW_BLOCK = 256


def subtract_start_(weight: Tensor, start: Start, scaling: float) -> None:
    """Takes scaling · B₀A₀ out of `weight` in place, by the recipe if the start has one."""
    if start.beta is not None:
        subtract_recipe_(weight, start.beta, start.lora_A.shape[0], scaling)
    else:
        subtract_factors_(weight, start.right(), start.lora_B, scaling)


def subtract_recipe_(weight: Tensor, beta: Tensor, r: int, scaling: float) -> None:
    """Takes scaling · β²ΦₙΦₘᵀ out of `weight` in place; a negative scaling adds it."""
    coefficient = (scaling * beta.to(torch.float64) ** 2).to(weight.device)
    torch.ops.lora.subtract_dst_(weight, coefficient, r)


def subtract_factors_(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
    """Takes scaling · BA out of `weight` in place; a negative scaling adds it.

    In float32 or wider and rounded once, by blocks of rows: no second matrix is formed.
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    lora_A = lora_A.to(work)
    for begin in range(0, weight.shape[0], _ROW_BLOCK):
        block = weight[begin : begin + _ROW_BLOCK]
        rows_B = lora_B[begin : begin + _ROW_BLOCK].to(work)
        block.copy_(torch.addmm(block.to(work), rows_B, lora_A, alpha=-scaling))
