"""Cases of the ahead-of-time gate for the kernels of `lora::grouped_linear`."""

from __future__ import annotations

import itertools

import torch

from lora_kernels.triton_kernels.grouped import gemm, grads, operator, schedule, shrink

BF16, FP32 = torch.bfloat16, torch.float32
SEED = torch.zeros((), dtype=torch.int64)
E, SIZE = 4, 1024
ENDS = torch.zeros(E, dtype=torch.int32)
ROWS = torch.zeros(SIZE, dtype=torch.int64)
FEW, MANY = 64, 128  # rows of a tile


def of(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor whose contents are never read: only dtype, strides and alignment matter."""
    return torch.empty(*shape, dtype=dtype)


def tiles(rows: int) -> schedule.Schedule:
    return schedule.schedule(ENDS, SIZE, rows)


def factors(r: int, dtype: torch.dtype = FP32) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of W [E, 256, 512]."""
    return of(E, r, 512, dtype=dtype), of(E, 256, r, dtype=dtype)


def product(
    arch: int, rows: int, r: int, *, start=False, gathers=False, kn=False, p=0.0, bias=False,
    dtype=BF16, factor=FP32,
) -> None:  # fmt: skip
    """One launch of the GEMM."""
    W = of(E, 512, 256, dtype=dtype).transpose(1, 2) if kn else of(E, 256, 512, dtype=dtype)
    z, B = of(SIZE, r, dtype=dtype), factors(r, factor)[1]
    rank = (z, B) if r else (None, None)
    gemm.gemm(
        132, arch >= 90, of(SIZE, 512, dtype=dtype), ROWS if gathers else None, W, tiles(rows),
        SIZE, *rank, 1.0, of(E, 256, dtype=dtype) if bias else None,
        *((z, B, -1.0) if start else (None, None, 0.0)), p, SEED,
    )  # fmt: skip


def grouped_gemm(arch: int) -> None:
    for rows, r, start in itertools.product((FEW, MANY), (16, 64), (False, True)):
        product(arch, rows, r, start=start, gathers=True, bias=r == 16)
        product(arch, rows, r, start=start, kn=True)
    for r, start in ((0, False), (8, True), (24, True), (32, False), (128, False)):
        product(arch, MANY, r, start=start, gathers=True)
    product(arch, MANY, 16, gathers=True, factor=BF16)


def grouped_gemm_dropped(arch: int) -> None:
    """dX with dropout."""
    for rows, (r, start) in itertools.product((FEW, MANY), ((16, True), (64, False))):
        product(arch, rows, r, start=start, kn=True, p=0.1)


def grouped_gemm_odd(arch: int) -> None:
    """Ranks and sizes that allow no wide accesses, and no tensor memory accelerator."""
    for r, start in ((1, False), (12, True), (61, True)):
        z, B, W = of(SIZE, r), of(E, 255, r, dtype=FP32), of(E, 255, 509)
        rank = (z, B, 1.0, of(E, 255), *((z, B, -1.0) if start else (None, None, 0.0)))
        gemm.gemm(132, arch >= 90, of(SIZE, 509), ROWS, W, tiles(FEW), SIZE, *rank)
        product(arch, MANY, r, start=start, gathers=True)
    product(arch, MANY, 61, start=True, kn=True, p=0.1)


def grouped_gemm_wide(arch: int) -> None:
    """In float32."""
    product(arch, FEW, 16, gathers=True, dtype=FP32)
    product(arch, FEW, 16, start=True, p=0.1, dtype=FP32)


def grouped_shrink(arch: int) -> None:
    many, few, dropped = tiles(MANY), tiles(FEW), (1.0, 1.0, 0.1, SEED)
    for r, start in itertools.product((16, 128), (False, True)):
        A, B = factors(r)
        for how in ((), dropped):
            shrink.shrink(of(SIZE, 512), ROWS, A, A if start else None, many, SIZE, *how)
        swapped = B.transpose(1, 2)
        shrink.shrink(of(SIZE, 256), None, swapped, swapped if start else None, many, SIZE)
    schedule.schedule(torch.zeros(128, dtype=torch.int32), SIZE, MANY, ROWS, 128)
    A, _ = factors(16, BF16)
    for how in ((), dropped):
        shrink.shrink(of(SIZE, 512), ROWS, A, None, few, SIZE, *how)
    A, _ = factors(61)
    shrink.shrink(of(SIZE, 512), ROWS, A, A, many, SIZE, *dropped)
    A, _ = factors(64)
    shrink.shrink(of(SIZE, 512), ROWS, A, None, many, SIZE)
    shrink.shrink(of(SIZE, 512, dtype=FP32), ROWS, A, A, few, SIZE, *dropped)


def grouped_grads(arch: int) -> None:
    for r, p in itertools.product((16, 128), (0.0, 0.1)):
        dA, dB = factors(r)
        grads.outer(of(SIZE, r), of(SIZE, 512), ROWS, tiles(grads.CHUNK), dA, 1.0, p, SEED)
        if not p:
            grads.outer(of(SIZE, r), of(SIZE, 256), None, tiles(grads.CHUNK), dB.transpose(1, 2))
    dA, _ = factors(64)
    wide = of(SIZE, 512, dtype=FP32)
    grads.outer(of(SIZE, 64, dtype=FP32), wide, ROWS, tiles(grads.CHUNK), dA, 1.0, 0.1, SEED)
    grads.sums(of(SIZE, 256), tiles(grads.CHUNK), of(E, 256))
    grads.scatter(of(SIZE, 512), ROWS, 128)


def grouped_whole(arch: int) -> None:
    """Both operators on tensors without contents: nothing on the host depends on these."""
    meta = {"device": "meta"}
    x, W = (torch.empty(*shape, dtype=BF16, **meta) for shape in ((128, 512), (E, 256, 512)))
    A, B = (torch.empty(*shape, **meta) for shape in ((E, 16, 512), (E, 256, 16)))
    ends, rows = ENDS.to("meta"), ROWS.to("meta")
    extras = (1.0, 0.0, None, None, None)
    y, z = operator.grouped_linear_forward(x, W, None, ends, rows, A, B, *extras)
    operator.grouped_linear_backward(y, x, W, ends, rows, A, B, z, *extras, [True] * 4)


CASES = {
    function.__name__: function
    for function in (
        grouped_gemm,
        grouped_gemm_dropped,
        grouped_gemm_odd,
        grouped_gemm_wide,
        grouped_shrink,
        grouped_grads,
        grouped_whole,
    )
}
MMA = {80: ["mma.sync", "cp.async"], 90: ["wgmma", "tma.load"], 100: ["tcgen05", "tma.load"]}
EXPECTS = {
    "grouped_gemm:grouped_gemm_kernel": MMA,
    "grouped_gemm_dropped:grouped_gemm_kernel": MMA,
    "grouped_shrink:grouped_shrink_kernel": {arch: ["cp.async"] for arch in (80, 90, 100)},
    "grouped_grads:grouped_outer_kernel": {arch: ["cp.async"] for arch in (80, 90, 100)},
    "grouped_grads:grouped_reduce_kernel": {arch: ["ld.global.128"] for arch in (80, 90, 100)},
    "grouped_grads:gather_sum_kernel": {arch: ["ld.global.128"] for arch in (80, 90, 100)},
}
