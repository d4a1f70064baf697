"""`lora::_frobenius_stats` on a GPU: weights of any shapes, dtypes and strides in one launch.

Each program adds up 65536 entries in float64. The last program of a weight to finish adds up the
totals of all programs of that weight, in a fixed order, so that equal weights give equal bits.
Bytes: every weight is read once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .jobs import (
    Kind,
    aligned,
    anchor,
    field,
    find_job,
    first_programs,
    kind_of,
    known,
    slots,
    tensor_at,
    upload,
)

FIELDS = tl.constexpr(8)
CHUNK = 65536
LANES, ROUNDS = 2048, 4  # ROUNDS loads of 16 bytes per thread are in flight together
TOTALS = 256  # the number of programs whose totals are added at a time
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
    """Sum and sum of squares of the entries [begin, begin + CHUNK) of a weight, in row order."""
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
    """`_chunk_totals` for a dtype given at run time, as one of DTYPE_CODES."""
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


@triton.jit(do_not_specialize=["jobs", "count", "programs"])
def stats_kernel(
    jobs,
    firsts,
    arrivals,
    base,
    partials,
    stats,
    count,
    programs,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    ROUNDS: tl.constexpr,
    TOTALS: tl.constexpr,
):
    """partials[program] = (sum, sum of squares) of a chunk; stats[k] = those of weight k.

    `arrivals` counts the finished programs of each weight; it is zero before and after.
    """
    program = tl.program_id(0)
    ONE: tl.constexpr = firsts is None
    k = program * 0
    first = program * 0
    end = first + programs
    job = jobs
    if not ONE:
        k = find_job(firsts, count, program, SLOTS)
        job = jobs + k * FIELDS
        first = tl.load(firsts + k)
        end = tl.load(firsts + k + 1, mask=k + 1 < count, other=programs)
    begin = (program - first).to(tl.int64) * CHUNK
    at, size, cols = field(job, 0, ONE), field(job, 1, ONE), field(job, 2, ONE)
    rs, cs = field(job, 3, ONE), field(job, 4, ONE)
    dtype, dense = field(job, 5, ONE), field(job, 6, ONE)
    s = tl.zeros([], tl.float64)
    q = tl.zeros([], tl.float64)
    if dense == 1:
        s, q = _totals(dtype, base, at, begin, size, cols, rs, cs, True, CHUNK, LANES, ROUNDS)
    else:
        s, q = _totals(dtype, base, at, begin, size, cols, rs, cs, False, CHUNK, LANES, ROUNDS)
    tl.store(partials + 2 * program, s)
    tl.store(partials + 2 * program + 1, q)
    # Publishes this program's totals, and makes those of all earlier arrivals visible to it.
    arrived = tl.atomic_add(arrivals + k, 1, sem="acq_rel", scope="gpu")
    if arrived + 1 == end - first:
        sums = tl.zeros([TOTALS], tl.float64)
        squares = tl.zeros([TOTALS], tl.float64)
        for each in range(first, end, TOTALS):
            e = each + tl.arange(0, TOTALS)
            # Bypasses the L1 cache, which may contain old values.
            sums += tl.load(partials + 2 * e, mask=e < end, other=0.0, cache_modifier=".cg")
            squares += tl.load(partials + 2 * e + 1, mask=e < end, other=0.0, cache_modifier=".cg")
        tl.store(stats + 2 * k, tl.sum(sums, 0))
        tl.store(stats + 2 * k + 1, tl.sum(squares, 0))
        tl.store(arrivals + k, 0)


def _job(kind: Kind) -> list[int]:
    """The table's row for a weight, without its address; then its number of programs."""
    (n, m), (row_stride, col_stride) = kind.shape, kind.strides
    if row_stride < col_stride:
        (n, m), (row_stride, col_stride) = (m, n), (col_stride, row_stride)
    # Contiguous, with an address and a size that allow vector loads.
    dense = kind.is_aligned and col_stride == 1 and row_stride == m and n * m % 16 == 0
    dtype, programs = DTYPE_CODES[kind.dtype], -(-n * m // CHUNK)
    return [0, n * m, m, row_stride, col_stride, dtype, int(dense), programs]


@functools.cache
def _idle_arrivals(device: torch.device, stream: int) -> torch.Tensor:
    """The counter [1] that all launches on one stream use; each leaves it at zero."""
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int64, device=device)


def _arrivals(device: torch.device) -> torch.Tensor:
    """A counter [1] of zero; a CUDA graph gets its own, as it may run during the stream's calls."""
    if device.type != "cuda":
        return _idle_arrivals(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int64, device=device)
    return _idle_arrivals(device, torch.cuda.current_stream(device).cuda_stream)


def frobenius_stats(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum and the sum of squares of each weight, [len, 2] in float64."""
    device, count = weights[0].device, len(weights)
    if count == 1:
        *job, programs = _job(kind_of(weights[0]))
        table, firsts, base, arrivals = tuple(job), None, weights[0], _arrivals(device)
        has_empty = not programs
    else:
        tensors = known(weights)
        table = tensors.rows(_job)
        base, origin = anchor(device)
        torch.sub(tensors.addresses, origin, out=table[:, 0])
        first, programs = first_programs(table[:, 7])
        has_empty = not table[:, 7].all()
        table, firsts, arrivals = upload(device, table, first, torch.zeros_like(first))
    options = {"dtype": torch.float64, "device": device}
    stats = torch.zeros(count, 2, **options) if has_empty else torch.empty(count, 2, **options)
    if programs:
        stats_kernel[(programs,)](
            table,
            firsts,
            arrivals,
            base,
            torch.empty(programs, 2, **options),
            stats,
            count,
            programs,
            SLOTS=slots(count),
            CHUNK=CHUNK,
            LANES=LANES,
            ROUNDS=ROUNDS,
            TOTALS=TOTALS,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return stats
