"""The passes over y and dy of a DoRA layer on a GPU: y = y₀ ∘ g + b, and its backward.

Both are limited by memory: the forward reads y₀ and writes y; the backward reads dy and y₀ and
writes dy₀, each once. The sums over rows are added in a fixed order, in two steps.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .integers import cdiv
from .launcher import Launch
from .linear.rank import reduce_all

BLOCK_M, BLOCK_N = 8, 256  # for the forward; with 512 columns, registers would spill
GRAD_M, GRAD_N = 16, 128
GRAD_ROWS = 128  # rows per program of the backward; constant, so that the bits do not vary


@triton.jit(do_not_specialize=["M"])
def dora_scale_kernel(
    y, y0, gain, bias, M, N,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [M, N] = y₀ ∘ gain + bias, rounded once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < M)[:, None] & (col < N)[None, :]
    where = row[:, None] * N + col[None, :]
    value = tl.load(y0 + where, mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(gain + col, mask=col < N, other=0.0)[None, :]
    if HAS_BIAS:
        value += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + where, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def dora_scale_grad_kernel(
    dy0, gain_parts, bias_parts, dy, y0, gain, M, N,
    NEEDS_Y0: tl.constexpr, NEEDS_GAIN: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dy₀ = dy ∘ gain; gain_parts and bias_parts [parts, N] = Σ dy ∘ y₀ and Σ dy of ROWS rows."""
    part = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = col < N
    factor = tl.load(gain + col, mask=in_cols, other=0.0)[None, :]
    gain_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in tl.range(0, ROWS, BLOCK_M, num_stages=2):
        row = part * ROWS + begin + tl.arange(0, BLOCK_M)
        mask = (row < M)[:, None] & in_cols[None, :]
        where = row[:, None] * N + col[None, :]
        grad = tl.load(dy + where, mask=mask, other=0.0).to(tl.float32)
        if NEEDS_Y0:
            tl.store(dy0 + where, (grad * factor).to(dy0.dtype.element_ty), mask=mask)
        if NEEDS_GAIN:
            gain_sums += grad * tl.load(y0 + where, mask=mask, other=0.0).to(tl.float32)
        if NEEDS_BIAS:
            bias_sums += grad
    at = part * N + col
    if NEEDS_GAIN:
        tl.store(gain_parts + at, tl.sum(gain_sums, 0), mask=in_cols)
    if NEEDS_BIAS:
        tl.store(bias_parts + at, tl.sum(bias_sums, 0), mask=in_cols)


def suits(y: torch.Tensor, gain: torch.Tensor) -> bool:
    """Whether the kernels support these tensors; float64 and empty ones use the reference."""
    return gain.dtype == torch.float32 and y.numel() > 0


def dora_scale(y0: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y₀ ∘ gain + bias in y₀'s dtype, for y₀ [..., N]; gain [N] is float32."""
    y0, gain, N = y0.contiguous(), gain.contiguous(), gain.shape[0]
    y = torch.empty_like(y0)
    shift = gain if bias is None else bias.contiguous()
    _scale_plan(y0.numel() // N, N, bias is not None)((y, y0, gain, shift))
    return y


def dora_scale_backward(
    grad: torch.Tensor,
    y0: torch.Tensor | None,
    gain: torch.Tensor,
    needs_y0: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dy ∘ gain, Σ dy ∘ y₀ in float32 if y₀ is given, Σ dy); empty if not needed."""
    dy, gain, N = grad.contiguous(), gain.contiguous(), gain.shape[0]
    M = dy.numel() // N
    parts = cdiv(M, GRAD_ROWS)
    has_gain = y0 is not None
    dy0 = torch.empty_like(dy) if needs_y0 else grad.new_empty(0)
    gain_parts = gain.new_empty(parts if has_gain else 0, N)
    bias_parts = gain.new_empty(parts if needs_bias else 0, N)
    before = dy if y0 is None else y0.contiguous()
    launch = _grad_plan(M, N, needs_y0, has_gain, needs_bias)
    launch((dy0, gain_parts, bias_parts, dy, before, gain))
    sums = [(gain_parts, torch.float32, 1.0)] * has_gain + [
        (bias_parts, dy.dtype, 1.0)
    ] * needs_bias
    found = iter(reduce_all(sums) if sums else ())
    dgain = next(found) if has_gain else gain.new_empty(0)
    dbias = next(found) if needs_bias else grad.new_empty(0)
    return dy0, dgain, dbias


@functools.lru_cache(maxsize=1024)
def _scale_plan(M: int, N: int, has_bias: bool) -> Launch:
    return Launch(
        dora_scale_kernel,
        (cdiv(M, BLOCK_M), cdiv(N, BLOCK_N)),
        (M, N),
        HAS_BIAS=has_bias,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        enable_fp_fusion=True,
    )


@functools.lru_cache(maxsize=1024)
def _grad_plan(M: int, N: int, needs_y0: bool, needs_gain: bool, needs_bias: bool) -> Launch:
    return Launch(
        dora_scale_grad_kernel,
        (cdiv(M, GRAD_ROWS), cdiv(N, GRAD_N)),
        (M, N),
        NEEDS_Y0=needs_y0,
        NEEDS_GAIN=needs_gain,
        NEEDS_BIAS=needs_bias,
        BLOCK_M=GRAD_M,
        BLOCK_N=GRAD_N,
        ROWS=GRAD_ROWS,
        enable_fp_fusion=True,
    )
