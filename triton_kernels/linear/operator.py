"""`lora::linear_forward` and `lora::linear_backward` on a GPU.

Each step can be computed in several ways, of which the fastest is measured for a shape
(`choice.fastest`):
  thin products (z, dz, dA, dB): a Triton kernel that reads x or dY once, or cuBLAS;
  the product with W: "fused" (one Triton kernel, with the rank term in its accumulator), "reversed"
  (rank term and bias first, the product added in place), "library" (the product first, as written
  by hand).
Three further ways compute z and y together: "decode" for up to 64 rows and "overlapped" for more,
each with two kernels that overlap; and "plain" for up to 1024 rows without dropout, with the
library's calls made from one C++ function.
The Triton kernels are designed for the tensor cores of 16-bit dtypes. float32, float64 and sizes
that do not allow 16-byte accesses use the library.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..philox import dropout as drop
from . import gemm
from .choice import fastest
from .decode import MOST_ROWS, decode
from .expand import expand
from .grads import dA, dz_dB, is_worth_it
from .shrink import shrink

HALVES = (torch.bfloat16, torch.float16)
FEW_ROWS = 1024  # up to here the host's time may be longer than the device's
LOW_RANK = 64  # up to here memory limits a thin product, and the Triton kernel is the default


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
    lora_R: Tensor | None,
    col_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """y [..., N] and z = drop(x) Aᵀ [M, r] in x's dtype."""
    rows = _rows(x)  # [M, K]
    N, r = lora_B.shape
    seed = seed if dropout > 0 else None
    bias = None if bias is None else bias.contiguous()
    key = _key(rows, weight, r, bias is not None, start_A is not None, dropout > 0)
    thin = _thin(rows, weight, lora_A, lora_B)

    def z_then_y() -> tuple[Tensor, Tensor]:
        ways = {
            "library": lambda: _shrink_library(rows, lora_A, start_A, dropout, seed, col_offset)
        }
        if thin:
            kernel = lambda: shrink(rows, lora_A, start_A, dropout, seed, col_offset)  # noqa: E731
            ways = _first(r <= LOW_RANK, "kernel", kernel, ways)
        z, z0 = fastest(("z", *key), ways, x.device)
        left = _through_R(z, lora_R)
        y = product(
            ("y", *key), thin, rows, weight, False, left, lora_B, scaling, bias,
            z0, start_B, -scaling,
        )  # fmt: skip
        return y, z

    def plain() -> tuple[Tensor, Tensor]:
        return torch.ops.lora._linear_plain(
            rows, weight, bias, lora_A, lora_B, scaling, start_A, start_B, lora_R
        )

    ways = {"steps": z_then_y}
    if dropout == 0.0:
        if not thin:  # the steps would make the same library calls
            ways = {"plain": plain}
        elif rows.shape[0] <= FEW_ROWS:
            ways["plain"] = plain
    if thin and rows.shape[0] <= MOST_ROWS and lora_R is None:  # its kernels do not apply R
        overlap = _capability(x.device) >= (9, 0)
        kernels = lambda: decode(  # noqa: E731
            rows, weight, bias, lora_A, lora_B, scaling, dropout, seed, start_A, start_B, overlap,
            col_offset,
        )  # fmt: skip
        ways = {"decode": kernels, **ways}
    elif thin and lora_R is None and start_A is None:
        ways |= _overlapped(rows, weight, bias, lora_A, lora_B, scaling, dropout, seed, col_offset)
    few = rows.shape[0] <= FEW_ROWS
    y, z = fastest(("forward", *key), ways, x.device, count_launches=few)
    # Not a view, so that a user may write to y in place.
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], N]), z


def _overlapped(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    col_offset: int,
) -> dict:
    """The way "overlapped", if the GPU and the sizes allow it."""
    is_kn = weight.stride(1) != 1
    matrix = weight.T if is_kn else weight
    suits = _is_hopper(rows.device) and gemm.overlaps(lora_B.shape[1], dropout > 0)
    if not (suits and gemm.fits(rows) and gemm.fits(matrix)):
        return {}
    kernels = functools.partial(
        gemm.overlapped,
        _multiprocessors(rows.device), rows, matrix, is_kn, lora_A, lora_B, scaling, bias,
        dropout, seed, _capability(rows.device) >= (9, 0), col_offset,
    )  # fmt: skip
    return {"overlapped": kernels}


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
    lora_R: Tensor | None,
    needs: list[bool],
    col_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, W, b, A, B, R, with an empty tensor for each that is not needed."""
    needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_R = needs
    seed = seed if dropout > 0 else None
    dy, rows, z = _rows(grad), _rows(x), z.contiguous()
    r = lora_B.shape[1]
    grads: list[Tensor | None] = [None] * 6
    key = _key(rows, weight, r, False, start_A is not None, dropout > 0)
    thin = _thin(rows, weight, lora_A, lora_B)
    if needs_x or needs_A or needs_B or needs_R:
        start = start_B if needs_x else None
        left = _through_R(z, lora_R) if needs_B else z
        ways = {"library": lambda: _dz_dB_library(dy, lora_B, start, left, scaling, needs_B)}
        if thin and is_worth_it(r, start is not None):
            kernel = lambda: dz_dB(dy, lora_B, start, left, scaling, needs_B)  # noqa: E731
            ways = {"kernel": kernel, **ways}
        dz, dz0, dB = fastest(("dz", needs_B, start is None, *key), ways, x.device)
        if needs_B:
            grads[4] = dB
        if needs_R:
            grads[5] = _mm(dz.T, z, lora_R.dtype)
        if lora_R is not None:
            dz = torch.mm(dz, lora_R.to(dz.dtype))
    if needs_A:
        dtype = lora_A.dtype
        dropped = lambda: drop(rows, dropout, seed, col_offset) if dropout else rows  # noqa: E731
        ways = {"library": lambda: _mm(dz.T, dropped(), dtype)}
        if thin:
            kernel = lambda: dA(dz, rows, dtype, dropout, seed, col_offset)  # noqa: E731
            ways = _first(r <= LOW_RANK or dropout > 0, "kernel", kernel, ways)
        grads[3] = fastest(("dA", *key), ways, x.device)
    if needs_x:
        start = None if start_A is None else start_A.T
        dx = product(
            ("dx", *key), thin, dy, weight, True, dz, lora_A.T, 1.0, None,
            dz0, start, 1.0, dropout, seed, col_offset,
        )  # fmt: skip
        grads[0] = dx if x.dim() == 2 else torch.ops.aten._unsafe_view(dx, x.shape)
    if needs_weight:
        grads[1] = dy.T @ rows
    if needs_bias:
        grads[2] = dy.sum(0)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


def product(
    key: tuple,
    thin: bool,
    a: Tensor,
    weight: Tensor,
    w_is_kn: bool,
    z: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None,
    z0: Tensor | None,
    B0: Tensor | None,
    scale0: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    col_offset: int = 0,
) -> Tensor:
    """a Wᵀ (a W if `w_is_kn`) + bias + scale · drop(z Bᵀ) + scale₀ · z₀ B₀ᵀ."""
    right = weight if w_is_kn else weight.T

    def reversed_() -> Tensor:
        y = expand(z, B, scale, bias, z0, B0, scale0, dropout, seed, col_offset)
        return y.addmm_(a, right)

    def library() -> Tensor:
        y = torch.mm(a, right) if bias is None else torch.addmm(bias, a, right)
        left, factor = z, B.to(z.dtype)
        if dropout > 0:
            y += drop(torch.mm(z, factor.T) * scale, dropout, seed, col_offset)
            return y if z0 is None else y.addmm_(z0, B0.to(z.dtype).T, alpha=scale0)
        if (
            z0 is not None
        ):  # one product of rank 2r, so that A, B and A₀, B₀ cancel before y is rounded
            left = torch.cat([z, z0], 1)
            factor = torch.cat([factor, (scale0 / scale if scale else 0.0) * B0.to(z.dtype)], 1)
        return y.addmm_(left, factor.T, alpha=scale)

    if not thin:
        return library()
    ways = {"reversed": reversed_, "library": library}
    if not dropout and _is_hopper(a.device):
        matrix, is_kn = weight, w_is_kn
        if weight.stride(1) != 1:  # GPT-2 stores W as [K, N]
            matrix, is_kn = weight.T, not w_is_kn
        flattens = _capability(a.device)[0] < 10
        if gemm.fits(a) and gemm.fits(matrix):
            for name in gemm.offered(z.shape[1], z0 is not None, flattens):
                ways[name] = functools.partial(
                    gemm.gemm,
                    name, _multiprocessors(a.device), a, matrix, is_kn, z, B, scale, bias,
                    z0, B0, scale0,
                )  # fmt: skip
    return fastest(key, ways, a.device)


def _through_R(z: Tensor, R: Tensor | None) -> Tensor:
    """z Rᵀ [M, r], which is then multiplied by Bᵀ; small enough for the library."""
    return z if R is None else torch.mm(z, R.to(z.dtype).T)


def _first(condition: bool, name: str, way, ways: dict) -> dict:
    """`ways` with `way` added: first, as the default, if `condition`, else last."""
    return {name: way, **ways} if condition else {**ways, name: way}


def _thin(a: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the Triton kernels support these dtypes and sizes."""
    N, K = weight.shape
    return a.shape[0] > 0 and _suit(a.dtype, A.dtype, B.dtype, N, K, B.shape[1])


@functools.lru_cache(maxsize=1024)
def _suit(dtype: torch.dtype, of_A: torch.dtype, of_B: torch.dtype, N: int, K: int, r: int) -> bool:
    if dtype not in HALVES or of_A.itemsize > 4 or of_B.itemsize > 4:
        return False
    aligned = N % 16 == K % 16 == 0
    return aligned and min(N, K, r) > 0 and (r <= LOW_RANK or r % 16 == 0)


def _key(rows: Tensor, weight: Tensor, r: int, *flags: bool) -> tuple:
    """The properties on which the choice of a way depends. The number of rows is rounded up to a
    power of two, like the kernels' blocks.
    """
    M = (rows.shape[0] - 1).bit_length()
    return (rows.device, rows.dtype, M, *weight.shape, weight.stride(1) == 1, r, *flags)


def _rows(x: Tensor) -> Tensor:
    """x as a matrix [M, K] whose rows are contiguous."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b as `dtype`; for float32 the product of 16-bit matrices is not rounded to 16 bits."""
    if a.dtype in HALVES and dtype == torch.float32 and a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(dtype)


def _shrink_library(
    rows: Tensor,
    A: Tensor,
    A0: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    col_offset: int,
) -> tuple[Tensor, Tensor | None]:
    dropped = drop(rows, dropout, seed, col_offset) if dropout > 0 else rows
    z = torch.mm(dropped, A.to(rows.dtype).T)
    return z, None if A0 is None else torch.mm(rows, A0.to(rows.dtype).T)


def _dz_dB_library(
    dy: Tensor, B: Tensor, B0: Tensor | None, z: Tensor, scaling: float, needs_B: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dz = torch.mm(dy, B.to(dy.dtype)).mul_(scaling)
    dz0 = None if B0 is None else torch.mm(dy, B0.to(dy.dtype)).mul_(-scaling)
    return dz, dz0, _mm(dy.T, z, B.dtype).mul_(scaling) if needs_B else None


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; (0, 0) in the interpreter, where `device` is the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _is_hopper(device: torch.device) -> bool:
    """Whether it is a Hopper or a data-center Blackwell GPU, for which `gemm` has its tiles."""
    return _capability(device)[0] in (9, 10)
