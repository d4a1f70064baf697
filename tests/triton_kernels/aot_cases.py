"""Cases of the ahead-of-time gate: calls of the wrappers in the configurations that ship."""

from __future__ import annotations

import itertools

import torch

from lora_kernels.triton_kernels import (
    dora,
    dst_basis,
    frobenius_stats,
    linear,
    loram_init,
    philox,
    row_norms,
    subtract_dst,
)

from . import aot_grouped

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SEED = torch.zeros((), dtype=torch.int64)
RANKS = (16, 64, 128)


def of(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor whose contents are never read: only dtype, strides and alignment matter."""
    return torch.empty(*shape, dtype=dtype)


def factors(
    r: int, K: int = 256, N: int = 256, dtype: torch.dtype = FP32
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B: the layer keeps them in float32, a user may have them in W's dtype."""
    return of(r, K, dtype=dtype), of(N, r, dtype=dtype)


def dst(arch: int) -> None:
    for dtype in (FP32, BF16, FP64):
        out = of(4096, 16, dtype=dtype)
        dst_basis.dst_basis_(out, 4096, 0)
        dst_basis.dst_basis_(out.T.contiguous().T, 4096, 0, torch.ones((), dtype=FP64))


def stats(arch: int) -> None:
    frobenius_stats.frobenius_stats([of(256, 256), of(256, 256, dtype=FP32)])
    frobenius_stats.frobenius_stats([of(100, 100)])  # a single program


def subtract(arch: int) -> None:
    coefficient = torch.ones((), dtype=FP64)
    for dtype in (BF16, FP16, FP32):
        for weight in (of(256, 256, dtype=dtype), of(256, 257, dtype=dtype)[:, 1:]):
            subtract_dst.subtract_dst_(weight, coefficient, 16, 256, 256, 0, 0)


def init(arch: int) -> None:
    weights = [of(256, 512), of(512, 256)]
    stats = frobenius_stats.frobenius_stats(weights)
    lora_A = [of(16, w.shape[1], dtype=FP32) for w in weights]
    lora_B = [of(w.shape[0], 16, dtype=FP32) for w in weights]
    beta = of(2, dtype=FP64)
    loram_init.loram_init_(
        weights, lora_A, lora_B, beta, stats, 16, 1.0, lambda shape: 0.5, None, None
    )


def norms(arch: int, dtypes: tuple[torch.dtype, ...] = (BF16, FP32)) -> None:
    for dtype, r in itertools.product(dtypes, (16, 32, 128)):
        right, left = factors(r)
        weight = of(256, 256, dtype=dtype)
        for W in (weight, weight.T.contiguous().T):
            row_norms.row_norms(W, right, left, 1.0)
    odd = of(100, 101, dtype=dtypes[0])[:, 1:]
    row_norms.row_norms(odd, of(3, 100, dtype=FP32), of(100, 3), 1.0)


def norms_double(arch: int) -> None:
    norms(arch, (FP64,))


def dora_passes(arch: int) -> None:
    for dtype, N in itertools.product((BF16, FP32), (256, 100)):
        y, gain, bias = of(512, N, dtype=dtype), of(N, dtype=FP32), of(N, dtype=dtype)
        for shift in (bias, None):
            dora.dora_scale(y, gain, shift)
            dora.dora_scale_backward(y, y, gain, True, shift is not None)


def dropout(arch: int) -> None:
    for dtype in (BF16, FP32):
        philox.dropout(of(256, 256, dtype=dtype), 0.1, SEED)


def shrink(arch: int) -> None:
    for r, start, dtype in itertools.product(RANKS, (False, True), (FP32, BF16)):
        A, _ = factors(r, dtype=dtype)
        linear.shrink.shrink(of(8192, 256), A, A if start else None, 0.0, SEED)
    A, _ = factors(16)
    linear.shrink.shrink(of(512, 256), A, None, 0.0, SEED)  # in parts


def shrink_dropped(arch: int) -> None:
    for r, start, dtype in itertools.product(RANKS, (False, True), (FP32, BF16)):
        A, _ = factors(r, dtype=dtype)
        linear.shrink.shrink(of(8192, 256), A, A if start else None, 0.1, SEED)


def expand(arch: int) -> None:
    for r, start, p in itertools.product((16, 128), (False, True), (0.0, 0.1)):
        _, B = factors(r)
        z = of(128, r)
        extra = (z, B, -1.0) if start else ()
        linear.expand.expand(z, B, 1.0, of(256), *extra)
        linear.expand.expand(z, B, 1.0, None, *(extra or (None, None, 0.0)), p, SEED)


def decode(arch: int) -> None:
    for M, r, start in itertools.product((1, 32, 64), (16, 64, 128), (False, True)):
        A, B = factors(r, 4096, 4096)
        starts = (A, B) if start else (None, None)
        linear.decode.decode(
            of(M, 4096), of(4096, 4096), of(4096), A, B, 1.0, 0.0, SEED, *starts, arch >= 90
        )
    x, W = of(1, 4096), of(14336, 4096)  # enough programs for a shorter pipeline
    for dtype in (FP32, BF16):
        A, B = factors(16, 4096, 14336, dtype)
        linear.decode.decode(x, W, None, A, B, 1.0, 0.0, SEED, None, None, arch >= 90)


def gemm(arch: int) -> None:
    if arch < 90:  # older GPUs have no tensor memory accelerator
        return
    ranks = itertools.product((8, 16, 24, 32, 40, 64, 128), (False, True))
    for (r, start), w_is_kn in itertools.product(ranks, (False, True)):
        z, (_, B), W = of(256, r), factors(r), of(256, 256)
        extra = (z, B, -1.0) if start else ()
        bias = of(256) if r <= 32 else None
        for config in linear.gemm.offered(r, start, arch < 100):
            linear.gemm.gemm(config, 132, W, W, w_is_kn, z, B, 1.0, bias, *extra)
            if r == 16:
                linear.gemm.gemm(config, 132, W, W, w_is_kn, z, B.bfloat16(), 1.0, bias, *extra)


def overlapped(arch: int) -> None:
    """The two kernels that must fit on a multiprocessor together: `test_aot` adds them up."""
    if arch < 90:
        return
    for r, p, bias in ((16, 0.0, None), (16, 0.1, of(256)), (24, 0.0, None), (32, 0.0, of(256))):
        A, B = factors(r)
        x, W = of(8192, 256), of(256, 256)
        linear.gemm.overlapped(132, x, W, False, A, B, 1.0, bias, p, SEED, True)


def grads(arch: int) -> None:
    dtypes = (FP32, BF16)
    for (r, start), dtype in itertools.product(((16, False), (16, True), (32, False)), dtypes):
        _, B = factors(r, dtype=dtype)
        linear.grads.dz_dB(of(512, 256), B, B if start else None, of(512, r), 1.0, True)
    for r, p in itertools.product(RANKS, (0.0, 0.1)):
        linear.grads.dA(of(512, r), of(512, 256), FP32, p, SEED)


def odd_sizes(arch: int) -> None:
    """Ranks that are not multiples of 16: other loads, other registers."""
    for r in (1, 12, 61):
        A, B = factors(r)
        for M in (64, 8192):
            linear.shrink.shrink(of(M, 256), A, A, 0.1, SEED)
        linear.expand.expand(of(128, r), B, 1.0, of(256), of(128, r), B, -1.0, 0.1, SEED)
        x, W = of(64, 256), of(256, 256)
        linear.decode.decode(x, W, of(256), A, B, 1.0, 0.0, SEED, A, B, arch >= 90)
        linear.grads.dA(of(512, r), of(512, 256), FP32, 0.1, SEED)
        if linear.grads.is_worth_it(r, True):
            linear.grads.dz_dB(of(512, 256), B, B, of(512, r), 1.0, True)


CASES = {
    function.__name__: function
    for function in (
        dst,
        stats,
        subtract,
        init,
        norms,
        norms_double,
        dora_passes,
        dropout,
        shrink,
        shrink_dropped,
        odd_sizes,
        expand,
        decode,
        gemm,
        overlapped,
        grads,
    )
} | aot_grouped.CASES
NEVER_LEFT_OUT = ("overlapped",)  # its kernels are compared with each other
WAIT = "griddepcontrol.wait"
EXPECTS = {
    # Memory-bound: 16-byte accesses, several in flight.
    "stats:stats_kernel": {arch: ["ld.global.128"] for arch in (80, 90)},
    "init:subtract_kernel": {arch: ["cp.async", "st.global.128"] for arch in (80, 90, 100)},
    "norms:row_norms_kernel": {arch: ["mma.sync", "cp.async"] for arch in (80, 90, 100)},
    "decode:decode_kernel": {80: ["cp.async"], 90: ["cp.async", WAIT], 100: ["cp.async", WAIT]},
    # Matrix cores.
    "gemm:gemm_kernel": {
        90: ["wgmma", "tma.load", "tma.store"],
        100: ["tcgen05", "tma.load", "tma.store"],
    },
    "overlapped:shrink_kernel": {
        arch: ["cp.async", "griddepcontrol.launch_dependents"] for arch in (90, 100)
    },
    "overlapped:gemm_kernel": {
        90: ["wgmma", "tma.load", "tma.store", WAIT],
        100: ["tcgen05", "tma.load", "tma.store", WAIT],
    },
    "expand:expand_kernel": {80: ["mma.sync"], 90: ["wgmma"], 100: ["tcgen05"]},
    "grads:dz_dB_kernel": {arch: ["mma.sync", "cp.async"] for arch in (80, 90, 100)},
    "grads:reduce_three_kernel": {arch: ["ld.global.128"] for arch in (80, 90, 100)},
    "shrink:shrink_kernel": {80: ["mma.sync", "cp.async"], 90: ["wgmma", "cp.async"]},
    "shrink_dropped:shrink_kernel": {arch: ["cp.async"] for arch in (80, 90, 100)},
} | aot_grouped.EXPECTS
