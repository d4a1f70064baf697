"""Cases in which the compile gate must find faults, and one with every kind of argument."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _double(X):
    x = tl.load(X)
    return x + x


@triton.jit
def spill(X, Y, BLOCK: tl.constexpr):
    """One warp keeps more values than its registers hold."""
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tl.store(Y + i, x / tl.sum(x))


@triton.jit
def matmul(A, B, C, K, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """A tile C [TILE, TILE] = A [TILE, K] B [K, TILE], by pointers."""
    i, k = tl.arange(0, TILE), tl.arange(0, DEPTH)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, DEPTH):
        a = tl.load(A + i[:, None] * K + start + k[None, :])
        b = tl.load(B + (start + k[:, None]) * TILE + i[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + i[:, None] * TILE + i[None, :], total.to(C.dtype.element_ty))


@triton.jit
def matmul_descriptors(A, B, C, K, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """The same by descriptors."""
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, DEPTH):
        total = tl.dot(A.load([0, start]), B.load([start, 0]), total)
    C.store([0, 0], total.to(C.dtype))


@triton.jit
def serialized(A, B, C, PARTS, steps, TILE: tl.constexpr):
    """Stores one product of a tile beside the sum of another: ptxas has wgmma wait (C7515)."""
    i = tl.arange(0, TILE)
    at = i[:, None] * TILE + i[None, :]
    b = tl.load(B + at)
    total = tl.zeros((TILE, TILE), tl.float32)
    for step in range(steps):
        a = tl.load(A + step * TILE * TILE + at)
        tl.store(PARTS + step * TILE * TILE + at, tl.dot(a, b))
        total = tl.dot(tl.trans(a), b, total)
    tl.store(C + at, total)


@triton.jit(do_not_specialize=["free"], do_not_specialize_on_alignment=["unaligned"])
def arguments(
    X, Y, Bias, pair, size, one, wide, free, unaligned, scale, flag, LOAD: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Takes an argument of every kind."""
    x = LOAD(X).to(KIND)
    if Bias is not None:
        x += tl.load(Bias)
    if flag:
        x = x * scale
    tl.store(Y, tl.load(pair[0]) + pair[1] + x + size + one + wide + free + unaligned)


def _spill(arch: int) -> None:
    x = torch.empty(16384)
    spill[(1,)](x, x, 16384, num_warps=1)


def _matmul(arch: int, depth: int = 64, stages: int = 3) -> None:
    a = torch.empty(128, 1024, dtype=torch.bfloat16)
    b, c = a.new_empty(1024, 128), a.new_empty(128, 128)
    matmul[(1,)](a, b, c, 1024, 128, depth, num_stages=stages)


def _serialized(arch: int) -> None:
    a = torch.empty(64, 64, dtype=torch.bfloat16)
    c = torch.empty(64, 64)
    serialized[(1,)](a, a, c, c, 8, 64, num_warps=16)


def _descriptors(arch: int) -> None:
    a = torch.empty(128, 1024, dtype=torch.bfloat16)
    b, c = a.new_empty(1024, 128), a.new_empty(128, 128)
    matmul_descriptors[(1,)](
        TensorDescriptor.from_tensor(a, [128, 64]),
        TensorDescriptor.from_tensor(b, [64, 128]),
        TensorDescriptor.from_tensor(c, [128, 128]),
        1024,
        128,
        64,
        num_warps=8,
    )


def _arguments(arch: int) -> None:
    x, i = torch.empty(32, dtype=torch.float64), torch.empty(32, dtype=torch.uint8)
    pair = (i, 3)
    for bias in (None, x, x[1:]):
        for size in (32, 48):  # both specialize to a multiple of 16: duplicates
            arguments[(1,)](
                x, x, bias, pair, size, 1, 2**40, 1, 32, 0.5, True, LOAD=_double, KIND=tl.float32
            )


def _newer(arch: int) -> None:
    if arch >= 90:
        _matmul(arch)


def _raise(arch: int) -> None:
    raise ValueError("a wrapper refuses its arguments")


CASES = {
    "spill": _spill,
    "shared": lambda arch: _matmul(arch, 128, 4),
    "dot": _matmul,
    "dot again": _matmul,
    "serialized": _serialized,
    "descriptors": _descriptors,
    "arguments": _arguments,
    "newer": _newer,
    "raise": _raise,
    "none": lambda arch: None,
}
EXPECTS = {
    "dot:matmul": {80: ("mma.sync",), 90: ("wgmma",), 100: ("tcgen05",)},
    "dot again:matmul": {90: ("mma.sync",)},
    "descriptors:matmul_descriptors": {90: ("wgmma", "tma.load", "tma.store")},
    "dot:nobody": {90: ("wgmma",)},
}
