"""The dropout mask as a function of (row, column, seed), as in `lora_kernels.ops.philox`."""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl

from .integers import cdiv
from .launcher import Launch

BLOCK_ROWS, BLOCK_COLS = 16, 256


@triton.jit
def drop(x, seed, row, col_begin, threshold, keep_scale, COLS: tl.constexpr, quad_offset=0):
    """x [ROWS, COLS] with each element set to zero or multiplied by `keep_scale`, in x's dtype.

    `row` [ROWS] are the row indices; the columns begin at `col_begin` + 4 `quad_offset`, where
    `col_begin` is a multiple of 4.
    """
    quad = col_begin // 4 + quad_offset + tl.arange(0, COLS // 4)  # four columns share a counter
    zero = tl.zeros([x.shape[0], COLS // 4], tl.uint32)
    c0 = zero + quad.to(tl.uint32)[None, :]
    c2 = zero + row.to(tl.uint32)[:, None]
    c3 = zero + (row.to(tl.int64) >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = tl.philox(seed, c0, zero, c2, c3)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [x.shape[0], COLS])
    wide = x if x.dtype == tl.float64 else x.to(tl.float32)
    kept = tl.where(words >= threshold.to(tl.uint32), wide * keep_scale, 0.0)
    return kept.to(x.dtype)


@triton.jit(do_not_specialize=["rows", "threshold", "quad_offset"])
def dropout_kernel(
    x,
    out,
    seed,
    rows,
    cols,
    x_stride,
    threshold,
    keep_scale,
    quad_offset,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    begin = tl.program_id(1) * BLOCK_COLS
    col = begin + tl.arange(0, BLOCK_COLS)
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    value = tl.load(x + row[:, None] * x_stride + col[None, :], mask=mask, other=0.0)
    word = tl.load(seed)
    dropped = drop(value, word, row, begin, threshold, keep_scale, BLOCK_COLS, quad_offset)
    tl.store(out + row[:, None] * cols + col[None, :], dropped, mask=mask)


@functools.lru_cache(maxsize=1024)
def mask_arguments(p: float) -> tuple[int, float]:
    """(threshold, factor): elements whose random word is below the threshold are dropped, the
    others are multiplied by the factor.

    The threshold is an int32 with the same bits: from 2^31 on (p >= 0.5), Triton would treat it as
    an int64 and compile the kernel a second time.
    """
    keep_scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    # Rounded to float32, the type of a kernel's float argument.
    (keep_scale,) = struct.unpack("f", struct.pack("f", keep_scale))
    (word,) = struct.unpack("i", struct.pack("I", min(int(p * 2**32), 2**32 - 1)))
    return word, keep_scale


def dropout(x: torch.Tensor, p: float, seed: torch.Tensor, col_offset: int = 0) -> torch.Tensor:
    """Dropout of x [M, K] with the mask of `seed`; x's first column is the mask's `col_offset`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, cols = x.shape
    if x.numel():
        _plan(rows, cols, x.stride(0))((x, out, seed), (*mask_arguments(p), col_offset // 4))
    return out


@functools.lru_cache(maxsize=1024)
def _plan(rows: int, cols: int, x_stride: int) -> Launch:
    return Launch(
        dropout_kernel,
        (cdiv(rows, BLOCK_ROWS), cdiv(cols, BLOCK_COLS)),
        (rows, cols, x_stride),
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_COLS=BLOCK_COLS,
        enable_fp_fusion=True,
    )
