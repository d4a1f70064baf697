"""`lora::dst_basis`: the orthonormal DST-I basis (LoRAM, arXiv 2507.06558, section 4)."""

from __future__ import annotations

import math

import torch

from .._utils.checks import FLOATS, check_size
from ._backends.library import define_composite, define_mutating_kernel

# Minimax polynomials of sine and cosine on [0, pi/4] (fdlibm's, error < 2^-57), highest power
# first. Every device evaluates them in this order, rounding each multiplication and each addition,
# so that all devices produce the same bits.
_SINE = (
    1.58969099521155010221e-10,
    -2.50507602534068634195e-08,
    2.75573137070700676789e-06,
    -1.98412698298579493134e-04,
    8.33333333332248946124e-03,
    -1.66666666666666324348e-01,
)
_COSINE = (
    -1.13596475577881948265e-11,
    2.08757232129817482790e-09,
    -2.75573143513906633035e-07,
    2.48015872894767294178e-05,
    -1.38888888888741095749e-03,
    4.16666666666666019037e-02,
)


def _horner(coefficients: tuple[float, ...], z: torch.Tensor) -> torch.Tensor:
    value = torch.full_like(z, coefficients[0])
    for coefficient in coefficients[1:]:
        value = coefficient + z * value
    return value


def sin_pi(numerator: torch.Tensor, denominator: int) -> torch.Tensor:
    """sin(π · numerator / denominator) in float64 for integer tensors, to 2 ulp at any size.

    The argument is reduced to [0, π/4] in exact integers before anything is rounded.
    """
    p = numerator % (2 * denominator)
    negative = p > denominator
    p = torch.where(negative, p - denominator, p)
    p = torch.where(2 * p > denominator, denominator - p, p)
    # A tensor, because CUDA divides by a Python number with its rounded reciprocal.
    span = torch.full((), 2.0 * denominator, dtype=torch.float64, device=p.device)
    by_cosine = 4 * p > denominator
    reduced = torch.where(by_cosine, denominator - 2 * p, 2 * p)
    x = math.pi * (reduced.to(torch.float64) / span)
    z = x * x
    sine = x + (z * x) * _horner(_SINE, z)
    half = 0.5 * z
    w = 1.0 - half
    cosine = w + (((1.0 - w) - half) + (z * z) * _horner(_COSINE, z))
    value = torch.where(by_cosine, cosine, sine)
    return torch.where(negative, -value, value)


def dst_basis_ref(
    out: torch.Tensor, size: int, offset: int, scale: torch.Tensor | None = None
) -> None:
    """Write rows [offset, offset + len(out)) of the basis of `size` into `out` [length, rank]."""
    length, rank = out.shape
    n = size + 1
    i = torch.arange(offset + 1, offset + length + 1, device=out.device)  # [length]
    j = torch.arange(1, rank + 1, device=out.device)  # [rank]
    table = math.sqrt(2.0 / n) * sin_pi(torch.arange(2 * n, device=out.device), n)  # [2n]
    if scale is not None:
        table = table * scale
    out.copy_(table[(i[:, None] * j) % (2 * n)])


def dst_basis(
    size: int,
    rank: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    offset: int = 0,
    length: int | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    length = size - offset if length is None else length
    dtype = dtype or torch.get_default_dtype()
    torch._check_type(dtype in FLOATS, lambda: f"dtype must be a real float, got {dtype}")
    check_size(size, "size")
    torch._check_value(
        rank >= 1 and rank <= size, lambda: f"rank must be in [1, {size}], got {rank}"
    )
    torch._check_value(
        offset >= 0 and length >= 0 and offset + length <= size,
        lambda: f"rows [{offset}, {offset + length}) do not lie in [0, {size})",
    )
    torch._check_value(
        scale is None or scale.numel() == 1, lambda: "scale must hold exactly one number"
    )
    device = device or (torch.get_default_device() if scale is None else scale.device)
    out = torch.empty(length, rank, dtype=dtype, device=device)
    if scale is not None:
        torch._check_value(
            scale.device == out.device,
            lambda: f"scale is on {scale.device}, the basis on {out.device}",
        )
    torch.ops.lora._dst_basis_(out, size, offset, scale)
    return out


define_mutating_kernel(
    "_dst_basis_(Tensor(a!) out, SymInt size, SymInt offset, Tensor? scale) -> ()",
    dst_basis_ref,
    lambda out, *rest: [out],
)
define_composite(
    "dst_basis(SymInt size, SymInt rank, *, ScalarType? dtype=None, Device? device=None, "
    "SymInt offset=0, SymInt? length=None, Tensor? scale=None) -> Tensor",
    dst_basis,
)
