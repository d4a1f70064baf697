"""`lora::grouped_linear_forward` and `lora::grouped_linear_backward` on a GPU.

Everything that depends on the values of `ends` and `rows` is computed on the device. A call neither
waits for these values nor allocates memory by them, and can be captured in a CUDA graph.

Forward: `shrink` gathers x for z; `gemm` gathers x again for the product with W, and adds the rank
term. Backward: dz = s · dY B; `gemm` multiplies dY by W and adds dz A; `scatter` adds up the
gradients of rows that came from the same row of x; `outer` sums up dA and dB.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .gemm import gemm, tile_rows
from .grads import CHUNK, outer, scatter, sums
from .schedule import schedule
from .shrink import shrink

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def suits(x: Tensor, weight: Tensor, rows: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether the kernels support these dtypes and sizes. They support a rank of 0."""
    factors = (lora_A, lora_B)
    if x.dtype not in DTYPES or any(factor.element_size() > 4 for factor in factors):
        return False
    size = x.shape[0] if rows is None else rows.shape[0]
    return min(*x.shape, *weight.shape, size) > 0 and max(*x.shape, size) < 2**30


def grouped_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [S, N] and z = drop(x[rows]) Aᵀ [S, r] in x's dtype."""
    x = _rows(x)
    size = x.shape[0] if rows is None else rows.shape[0]
    r = lora_A.shape[1]
    rows = None if rows is None else rows.contiguous()
    most = tile_rows(x.dtype, size, *weight.shape)
    tiles = schedule(ends.contiguous(), size, most, rows, x.shape[0])
    if r:
        z, z0 = shrink(x, rows, lora_A, start_A, tiles, size, dropout=dropout, seed=seed)
    else:
        z, z0, start_B = x.new_empty(size, 0), None, None
    y = gemm(
        _multiprocessors(x.device), _has_tma(x.device), x, rows, weight, tiles, size,
        z if r else None, lora_B if r else None, scaling,
        None if bias is None else bias.contiguous(), z0, start_B, -scaling,
    )  # fmt: skip
    return y, z


def grouped_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    rows: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    z: Tensor,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
    start_A: Tensor | None,
    start_B: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, b, A, B, with an empty tensor for each that is not needed."""
    needs_x, needs_bias, needs_A, needs_B = needs
    dy, x, z, ends = _rows(grad), _rows(x), z.contiguous(), ends.contiguous()
    rows = None if rows is None else rows.contiguous()
    size, r = dy.shape[0], lora_A.shape[1]
    grads: list[Tensor | None] = [None] * 4
    tiles = schedule(ends, size, tile_rows(x.dtype, size, *weight.shape))
    chunks = schedule(ends, size, CHUNK)
    dz = dz0 = None
    if r and (needs_x or needs_A):
        start = start_B if needs_x else None
        dz, dz0 = shrink(
            dy, None, _swapped(lora_B), _swapped(start), tiles, size, scaling, -scaling
        )
    if needs_x:
        start = None if start_A is None or not r else _swapped(start_A)
        dx = gemm(
            _multiprocessors(x.device), _has_tma(x.device), dy, None, weight.transpose(1, 2),
            tiles, size, dz, _swapped(lora_A) if r else None, 1.0, None, dz0, start, 1.0,
            dropout, seed,
        )  # fmt: skip
        grads[0] = dx if rows is None else scatter(dx, rows, x.shape[0])
    if needs_bias:
        grads[1] = sums(dy, chunks, torch.empty(weight.shape[:2], dtype=x.dtype, device=x.device))
    if needs_A:
        dA = torch.empty(lora_A.shape, dtype=lora_A.dtype, device=x.device)
        grads[2] = outer(dz, x, rows, chunks, dA, 1.0, dropout, seed) if r else dA
    if needs_B:
        dB = torch.empty(lora_B.shape, dtype=lora_B.dtype, device=x.device)
        grads[3] = dB
        if r:
            outer(z, dy, None, chunks, _swapped(dB), scaling)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _swapped(factor: Tensor | None) -> Tensor | None:
    """Each expert's matrix, transposed as a view."""
    return None if factor is None else factor.transpose(1, 2)


def _rows(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors; a few in the interpreter, where `device` is the CPU."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _has_tma(device: torch.device) -> bool:
    """Whether it is a Hopper or a data-center Blackwell GPU, for which `gemm` has its tiles."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
