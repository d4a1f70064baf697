"""Sines of rational multiples of π from exact integers, bit for bit as in the other backends."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sin_pi(p, n):
    """sin(π p / n) in float64 for int64 p in [0, 2n), n <= 2^61.

    The polynomials are those of `lora_kernels.ops.dst_basis`, in the same order. Launch with
    `enable_fp_fusion=False`: a fused multiply-add rounds once where the other backends round twice.
    """
    negative = p > n
    p = tl.where(negative, p - n, p)
    p = tl.where(2 * p > n, n - p, p)
    by_cosine = 4 * p > n
    reduced = tl.where(by_cosine, n - 2 * p, 2 * p)
    x = 3.141592653589793 * (reduced.to(tl.float64) / (2 * n).to(tl.float64))
    z = x * x

    r = z * 0.0 + 1.58969099521155010221e-10
    r = -2.50507602534068634195e-08 + z * r
    r = 2.75573137070700676789e-06 + z * r
    r = -1.98412698298579493134e-04 + z * r
    r = 8.33333333332248946124e-03 + z * r
    r = -1.66666666666666324348e-01 + z * r
    sine = x + (z * x) * r

    r = z * 0.0 + -1.13596475577881948265e-11
    r = 2.08757232129817482790e-09 + z * r
    r = -2.75573143513906633035e-07 + z * r
    r = 2.48015872894767294178e-05 + z * r
    r = -1.38888888888741095749e-03 + z * r
    r = 4.16666666666666019037e-02 + z * r
    half = 0.5 * z
    w = 1.0 - half
    cosine = w + (((1.0 - w) - half) + (z * z) * r)

    value = tl.where(by_cosine, cosine, sine)
    return tl.where(negative, -value, value)


@triton.jit
def modulo(x, n):
    """x mod n for int64 0 <= x < 2^52, with a tenth of the instructions of `%`."""
    r = x - (x.to(tl.float64) / n.to(tl.float64)).to(tl.int64) * n
    r = tl.where(r < 0, r + n, r)
    return tl.where(r >= n, r - n, r)


@triton.jit
def cos_pi(p, n):
    """cos(π p / n) in float64 for int64 p in [0, 2n), n <= 2^60."""
    p = 2 * p + n
    return sin_pi(tl.where(p >= 4 * n, p - 4 * n, p), 2 * n)
