"""`lora::_frobenius_stats` on a GPU: weights of any shapes, dtypes and strides in two launches.

Each program adds up 65536 entries in float64, a second kernel adds the programs' totals in order:
no atomics, so that the same weights give the same bits. Bytes: every weight once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .jobs import aligned, anchor, find_job, slots, tensor_at, upload

FIELDS = tl.constexpr(8)
CHUNK = 65536
LANES, ROUNDS = 2048, 4  # ROUNDS loads of 16 bytes a thread are under way together
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@triton.jit
def _chunk_totals(
    base,
    at,
    begin,
    size,
    cols,
    row_stride,
    col_stride,
    DTYPE: tl.constexpr,
    DENSE: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Sum and sum of squares of the entries [begin, begin + CHUNK) of a weight, row by row."""
    pointer = tensor_at(base, at, DTYPE, DENSE)
    if DENSE:
        size = aligned(size, 16)
    t = tl.arange(0, LANES)
    sums = tl.zeros([LANES], tl.float64)
    squares = tl.zeros([LANES], tl.float64)
    for step in range(0, CHUNK, ROUNDS * LANES):
        for part in tl.static_range(ROUNDS):
            e = begin + step + part * LANES + t
            where = e
            if not DENSE:  # noqa: SIM102, the outer condition is the compiler's
                if row_stride != cols or col_stride != 1:
                    where = e // cols * row_stride + e % cols * col_stride
            wide = tl.load(pointer + where, mask=e < size, other=0.0).to(tl.float64)
            sums += wide
            squares += wide * wide
    return tl.sum(sums, 0), tl.sum(squares, 0)


@triton.jit
def _totals(
    dtype,
    base,
    at,
    begin,
    size,
    cols,
    rs,
    cs,
    DENSE: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """`_chunk_totals` of a dtype that only the table knows (DTYPE_CODES)."""
    s = tl.zeros([], tl.float64)
    q = tl.zeros([], tl.float64)
    if dtype == 0:
        s, q = _chunk_totals(
            base, at, begin, size, cols, rs, cs, tl.float32, DENSE, CHUNK, LANES, ROUNDS
        )
    elif dtype == 1:
        s, q = _chunk_totals(
            base, at, begin, size, cols, rs, cs, tl.bfloat16, DENSE, CHUNK, LANES, ROUNDS
        )
    elif dtype == 2:
        s, q = _chunk_totals(
            base, at, begin, size, cols, rs, cs, tl.float16, DENSE, CHUNK, LANES, ROUNDS
        )
    else:
        s, q = _chunk_totals(
            base, at, begin, size, cols, rs, cs, tl.float64, DENSE, CHUNK, LANES, ROUNDS
        )
    return s, q


@triton.jit
def partial_stats_kernel(
    jobs,
    base,
    partials,
    count,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """partials[program] = (sum, sum of squares) of one chunk of one weight."""
    program = tl.program_id(0)
    job = jobs + find_job(jobs, count, program, FIELDS, SLOTS) * FIELDS
    begin = (program - tl.load(job)) * CHUNK
    at, size, cols = tl.load(job + 1), tl.load(job + 2), tl.load(job + 3)
    rs, cs = tl.load(job + 4), tl.load(job + 5)
    dtype, dense = tl.load(job + 6), tl.load(job + 7)
    s = tl.zeros([], tl.float64)
    q = tl.zeros([], tl.float64)
    if dense == 1:
        s, q = _totals(dtype, base, at, begin, size, cols, rs, cs, True, CHUNK, LANES, ROUNDS)
    else:
        s, q = _totals(dtype, base, at, begin, size, cols, rs, cs, False, CHUNK, LANES, ROUNDS)
    tl.store(partials + 2 * program, s)
    tl.store(partials + 2 * program + 1, q)


@triton.jit(do_not_specialize=["programs"])
def reduce_stats_kernel(jobs, partials, stats, programs, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """stats[k] = the sum over weight k's programs, in order."""
    k = tl.program_id(0)
    begin = tl.load(jobs + k * FIELDS)
    end = programs.to(tl.int64)
    if k + 1 < tl.num_programs(0):
        end = tl.load(jobs + (k + 1) * FIELDS)
    sums = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(partials + 2 * at, mask=at < end, other=0.0)
        squares += tl.load(partials + 2 * at + 1, mask=at < end, other=0.0)
    tl.store(stats + 2 * k, tl.sum(sums, 0))
    tl.store(stats + 2 * k + 1, tl.sum(squares, 0))


@functools.lru_cache(maxsize=4096)
def _job(
    shape: tuple[int, int], stride: tuple[int, int], dtype: torch.dtype, aligned_: bool
) -> tuple[int, ...]:
    """What the table says of a weight beside its address."""
    (n, m), (row_stride, col_stride) = shape, stride
    if row_stride < col_stride:
        (n, m), (row_stride, col_stride) = (m, n), (col_stride, row_stride)
    # Contiguous, and of a place and size that vector loads can be sure of.
    dense = col_stride == 1 and row_stride == m and aligned_ and n * m % 16 == 0
    return (n * m, m, row_stride, col_stride, DTYPE_CODES[dtype], int(dense))


def frobenius_stats(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """-> [len, 2] float64: sum and sum of squares of each weight."""
    device = weights[0].device
    base, origin = anchor(weights[0])
    rows, programs = [], 0
    for weight in weights:
        address = weight.data_ptr()
        job = _job(tuple(weight.shape), weight.stride(), weight.dtype, address % 16 == 0)
        rows.append([programs, address - origin, *job])
        programs += -(-job[0] // CHUNK)
    (jobs,) = upload(device, rows)
    partials = torch.empty(max(programs, 1), 2, dtype=torch.float64, device=device)
    stats = torch.empty(len(rows), 2, dtype=torch.float64, device=device)
    if programs:
        partial_stats_kernel[(programs,)](
            jobs,
            base,
            partials,
            len(rows),
            SLOTS=slots(len(rows)),
            CHUNK=CHUNK,
            LANES=LANES,
            ROUNDS=ROUNDS,
            num_warps=8,
            enable_fp_fusion=True,
        )
    reduce_stats_kernel[(len(rows),)](
        jobs, partials, stats, programs, FIELDS=FIELDS.value, BLOCK=256, enable_fp_fusion=True
    )
    return stats
