"""`lora::_dst_basis_` on a GPU, for one basis or for the A or B of a whole model.

An entry is g · sin((p+1)(q+1)π/N). A program takes 16 values of p and goes along q in blocks of 32.
Angle addition computes an entry in two float64 operations from two angles' sines and cosines: the
angle at the block's first column, and the step within the block. Both are computed exactly from
integers at the beginning; the former is then advanced by a fixed angle per block. The result has an
error of about 1e-14. Where that error could change the rounding to the output's dtype (about once
in 10^6 entries, detected from the last bits of the float64), the block is written again with a sine
computed for every entry.
Bytes: the output is written once. Computing every sine would take 60 float64 operations per entry,
and reading a table of sines would take 32 cache lines per warp: several times the time of the
writes (estimated).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .jobs import (
    Kind,
    anchor,
    field,
    find_job,
    first_programs,
    float_bits,
    known,
    slots,
    tensor_at,
    to_float,
    upload,
)
from .sine import cos_pi, modulo, sin_pi

BLOCK_P, BLOCK_Q = 16, 32  # 4 entries per thread
MOST_REGISTERS = 168  # for three programs per multiprocessor; by default ptxas spills to reach 128
LONG = 1024
MOST_STEPS = 32  # blocks per program, each with one bit of an int32
ENOUGH_PROGRAMS = 396  # three per multiprocessor of an H100 or H200
FIELDS = tl.constexpr(13)
TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _store(out, p, q, p_stride, q_stride, mask, value, OUT: tl.constexpr):
    where = p[:, None].to(tl.int64) * p_stride + q[None, :].to(tl.int64) * q_stride
    if tl.float64 == OUT:
        tl.store(out + where, value, mask=mask)
    else:  # through float32, as the reference converts
        tl.store(out + where, value.to(tl.float32).to(OUT), mask=mask)


@triton.jit
def _any(flags):
    return tl.max(tl.max((flags != 0).to(tl.int32), 1), 0) > 0


@triton.jit
def _round_apart(low, high):
    """Whether the float64 `low` <= `high` round to different float32 values. They must be less than
    2^29 units in the last place apart, and normal in float32. True if the middle of two neighboring
    float32 values, where the last 29 bits are 2^28, lies between them. Conversions to float32 would
    run at a quarter of the speed.
    """
    half: tl.constexpr = 1 << 28
    low = low.to(tl.int64, bitcast=True).to(tl.int32) + half
    high = high.to(tl.int64, bitcast=True).to(tl.int32) + half
    return ((low ^ high) >> 29) & 1


# `base` is not specialized on alignment: threads store 4 or 2 bytes each. With 16-byte stores the
# compiler would first change the layout, with a barrier each time.
@triton.jit(do_not_specialize=["jobs", "count", "steps"], do_not_specialize_on_alignment=["base"])
def dst_fill_kernel(
    jobs,
    firsts,
    base,
    scales,
    count,
    steps,
    OUT: tl.constexpr,
    Q_CONTIGUOUS: tl.constexpr,
    P_CONTIGUOUS: tl.constexpr,
    EXACT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    chunk = tl.program_id(0)
    ONE: tl.constexpr = firsts is None
    job = jobs
    if not ONE:
        k = find_job(firsts, count, chunk, SLOTS)
        job = jobs + k * FIELDS
        chunk -= tl.load(firsts + k)
    out = tensor_at(base, field(job, 0, ONE), OUT, False)
    p_size, q_size = field(job, 1, ONE), field(job, 2, ONE)
    p_stride, q_stride = field(job, 3, ONE), field(job, 4, ONE)
    if P_CONTIGUOUS:
        p_stride = 1
    if Q_CONTIGUOUS:
        q_stride = 1
    n = field(job, 7, ONE)
    norm = to_float(field(job, 8, ONE))
    scale = norm * 0.0 + 1.0
    if scales is not None:
        scale = tl.load(scales + field(job, 9, ONE))
    gain = norm * scale
    # A bound on the error of both ways to compute an entry; the largest found in a search was
    # 0.84 (16 + 2 steps) roundings.
    slack = tl.abs(gain) * (16 + 4 * steps).to(tl.float64) * 1.12e-16
    zero = tl.abs(gain) * 1e-10  # below the smallest nonzero sine of any size under 2^30
    # The conditions of `_round_apart`: 2 slack is below 2^-44.7 gain, and 2^29 units in the last
    # place of the smallest sine, which is above 2^-20.4, are 2^-44.4. If the gain is zero (its sign
    # matters), NaN or infinite, a sine is computed for every entry.
    can_tell = (n < 4194304) & (tl.abs(gain) > 1e-31) & (tl.abs(gain) < 1e300)

    q_chunks = tl.cdiv(q_size, BLOCK_Q * steps)
    p = chunk // q_chunks * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    q_begin = chunk % q_chunks * (BLOCK_Q * steps)
    step = tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    a = p + field(job, 5, ONE) + 1
    b0 = q_begin + field(job, 6, ONE) + 1
    inside = modulo(a[:, None] * step[None, :], 2 * n)  # [BLOCK_P, BLOCK_Q]
    first, turn = (a * b0) % (2 * n), (a * BLOCK_Q) % (2 * n)
    undecided = tl.zeros([BLOCK_P, BLOCK_Q], tl.int32)  # one bit per block
    if EXACT or (can_tell == 0):
        undecided = tl.full([BLOCK_P, BLOCK_Q], -1, tl.int32)
    else:
        inside_sine, inside_cosine = sin_pi(inside, n), cos_pi(inside, n)
        sine, cosine = sin_pi(first, n), cos_pi(first, n)  # [BLOCK_P], at the block's first column
        turn_sine, turn_cosine = sin_pi(turn, n), cos_pi(turn, n)
        for block in range(steps):
            q = q_begin + block * BLOCK_Q + step
            mask = (p < p_size)[:, None] & (q < q_size)[None, :]
            value = tl.fma(
                (gain * sine)[:, None], inside_cosine, (gain * cosine)[:, None] * inside_sine
            )
            is_zero = tl.abs(value) < zero
            apart = _round_apart(value - slack, value + slack)
            undecided |= tl.where(mask & (is_zero == 0), apart, 0) << block
            value = tl.where(is_zero, gain * 0.0, value)
            _store(out, p, q, p_stride, q_stride, mask, value, OUT)
            turned = sine * turn_cosine + cosine * turn_sine
            cosine = cosine * turn_cosine - sine * turn_sine
            sine = turned
    if EXACT or _any(undecided):
        for block in range(steps):
            if EXACT or _any((undecided >> block) & 1):
                q = q_begin + block * BLOCK_Q + step
                mask = (p < p_size)[:, None] & (q < q_size)[None, :]
                index = modulo(first + block * turn, 2 * n)[:, None] + inside
                index = tl.where(index >= 2 * n, index - 2 * n, index)
                value = (norm * sin_pi(index, n)) * scale
                _store(out, p, q, p_stride, q_stride, mask, value, OUT)


def _job(
    shape: tuple[int, int], stride: tuple[int, int], size: int, offset: int = 0
) -> tuple[int, ...]:
    """The table's row for a basis, without its address and the index of its scale. Three more
    numbers follow: the numbers of blocks along p and along q, and the contiguous axis: q (0), p
    (1), neither (2). The contiguous axis becomes q if it is long.
    """
    row, col = (shape[0], stride[0], offset), (shape[1], stride[1], 0)
    contiguous, other = (row, col) if stride[0] < stride[1] else (col, row)
    along_other = contiguous[0] < LONG and other[0] > contiguous[0]
    q, p = (other, contiguous) if along_other else (contiguous, other)
    norm = float_bits(math.sqrt(2.0 / (size + 1)))
    group = 0 if q[1] == 1 else 1 if p[1] == 1 else 2
    blocks = -(-p[0] // BLOCK_P), -(-q[0] // BLOCK_Q)
    return (0, p[0], q[0], p[1], q[1], p[2], q[2], size + 1, norm, 0, *blocks, group)


def _steps(tiles: int) -> int:
    """The number of blocks per program."""
    return min(1 << max(tiles // ENOUGH_PROGRAMS - 1, 0).bit_length(), MOST_STEPS)


def _launch(programs, table, firsts, base, scales, count, steps, dtype, group) -> None:
    dst_fill_kernel[(programs,)](
        table,
        firsts,
        base,
        scales,
        count,
        steps,
        OUT=TRITON_DTYPES[dtype],
        Q_CONTIGUOUS=group == 0,
        P_CONTIGUOUS=group == 1,
        EXACT=dtype == torch.float64,
        SLOTS=slots(count),
        BLOCK_P=BLOCK_P,
        BLOCK_Q=BLOCK_Q,
        num_warps=4,
        maxnreg=MOST_REGISTERS,
        enable_fp_fusion=False,
    )


def fill_factors(
    lora_A: Sequence[torch.Tensor], lora_B: Sequence[torch.Tensor], scales: torch.Tensor
) -> None:
    """Write A_k [rank, m] = scales[k] Φₘᵀ and B_k [n, rank] = scales[k] Φₙ, all of one dtype."""
    device, dtype, count = lora_A[0].device, lora_A[0].dtype, len(lora_A)

    def row_of_a(kind: Kind) -> tuple[int, ...]:
        return _job(kind.shape[::-1], kind.strides[::-1], kind.shape[1])

    def row_of_b(kind: Kind) -> tuple[int, ...]:
        return _job(kind.shape, kind.strides, kind.shape[0])

    base, origin = anchor(device)
    launches, tables = [], []
    for factors, row in ((lora_A, row_of_a), (lora_B, row_of_b)):
        tensors = known(factors)
        rows = tensors.rows(row)
        torch.sub(tensors.addresses, origin, out=rows[:, 0])
        torch.arange(count, out=rows[:, 9])
        groups = {row(kind)[12] for kind in tensors.kinds}
        for group in groups:
            mine = rows if len(groups) == 1 else rows[rows[:, 12] == group]
            steps = _steps(int((mine[:, 10] * mine[:, 11]).sum()))
            first, programs = first_programs(mine[:, 10] * ((mine[:, 11] + steps - 1) // steps))
            launches.append((programs, len(mine), steps, group))
            tables += [mine, first]
    tables = iter(upload(device, *tables))
    for programs, length, steps, group in launches:
        table, firsts = next(tables), next(tables)
        _launch(programs, table, firsts, base, scales, length, steps, dtype, group)


def dst_basis_(
    out: torch.Tensor, size: int, offset: int, scale: torch.Tensor | None = None
) -> None:
    """Write rows [offset, offset + len(out)) of the basis of `size` to `out`, of any strides."""
    if not out.numel():
        return
    scales = None if scale is None else scale.reshape(1).to(torch.float64)
    *job, p_blocks, q_blocks, group = _job(out.shape, out.stride(), size, offset)
    steps = _steps(p_blocks * q_blocks)
    programs = p_blocks * -(-q_blocks // steps)
    _launch(programs, tuple(job), None, out, scales, 1, steps, out.dtype, group)
