"""`lora::_dst_basis_` on a GPU, for one basis or for the A or B of a whole model.

An entry is g · sin((p+1)(q+1)π/N). A program takes 8 p and walks along q in blocks of 128. Angle
addition gives an entry for two float64 operations, from the sines of the block's first column and
those of the steps inside of a block; both begin exact, from integers, and the first turns on by a
fixed angle. That is right to some 1e-14, not to the last bit: where two neighbours of a value would
round differently (once in some 10^6 entries), the block is written again, sine by sine.
Bytes: the output, once. A sine each would take 60 float64 operations an entry, and a gather from a
table of sines 32 cache lines a warp: both several times what the memory takes (estimated).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .jobs import anchor, find_job, float_bits, load_float, slots, tensor_at, upload
from .sine import cos_pi, modulo, sin_pi

BLOCK_P, BLOCK_Q = 8, 128
LONG = 1024
MOST_STEPS = 32  # blocks that share the exact sines of a program, and a bit each in an int32
ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200
FIELDS = tl.constexpr(11)
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
    else:  # by float32, as the reference's conversion
        tl.store(out + where, value.to(tl.float32).to(OUT), mask=mask)


@triton.jit
def _any(flags):
    return tl.max(tl.max((flags != 0).to(tl.int32), 1), 0) > 0


@triton.jit(do_not_specialize=["steps"])
def dst_fill_kernel(
    jobs,
    base,
    scales,
    count,
    steps,
    OUT: tl.constexpr,
    Q_CONTIGUOUS: tl.constexpr,
    P_CONTIGUOUS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    program = tl.program_id(0)
    k = find_job(jobs, count, program, FIELDS, SLOTS)
    job = jobs + k * FIELDS
    chunk = program - tl.load(job)
    out = tensor_at(base, tl.load(job + 1), OUT, False)
    p_size, q_size = tl.load(job + 2), tl.load(job + 3)
    p_stride, q_stride = tl.load(job + 4), tl.load(job + 5)
    # Stored 4 or 2 bytes a thread: 16 would want another layout, and a barrier each time.
    if P_CONTIGUOUS:
        p_stride = 1
    if Q_CONTIGUOUS:
        q_stride = 1
    n = tl.load(job + 8)
    norm = load_float(job + 9)
    scale = norm * 0.0 + 1.0
    if HAS_SCALE:
        scale = tl.load(scales + tl.load(job + 10))
    gain = norm * scale
    # Above the errors of both ways to an entry: under 0.84 (16 + 2 steps) roundings in a search.
    slack = tl.abs(gain) * (16 + 4 * steps).to(tl.float64) * 1.12e-16
    zero = tl.abs(gain) * 1e-10  # below the smallest sine but 0 of any size under 2^30

    q_chunks = tl.cdiv(q_size, BLOCK_Q * steps)
    p = chunk // q_chunks * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    q_begin = chunk % q_chunks * (BLOCK_Q * steps)
    step = tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    a = p + tl.load(job + 6) + 1
    b0 = q_begin + tl.load(job + 7) + 1
    inside = modulo(a[:, None] * step[None, :], 2 * n)  # [BLOCK_P, BLOCK_Q]
    inside_sine, inside_cosine = sin_pi(inside, n), cos_pi(inside, n)
    first, turn = (a * b0) % (2 * n), (a * BLOCK_Q) % (2 * n)
    sine, cosine = sin_pi(first, n), cos_pi(first, n)  # [BLOCK_P], of the block's first column
    turn_sine, turn_cosine = sin_pi(turn, n), cos_pi(turn, n)
    undecided = tl.zeros([BLOCK_P, BLOCK_Q], tl.int32)  # a bit for each block
    if slack == 0.0:  # zeros, whose signs are to be right
        undecided = tl.full([BLOCK_P, BLOCK_Q], -1, tl.int32)
    if not EXACT:
        for block in range(steps):
            q = q_begin + block * BLOCK_Q + step
            mask = (p < p_size)[:, None] & (q < q_size)[None, :]
            value = tl.fma(
                (gain * sine)[:, None], inside_cosine, (gain * cosine)[:, None] * inside_sine
            )
            is_zero = tl.abs(value) < zero
            value = tl.where(is_zero, gain * 0.0, value)
            narrow = (value + slack).to(tl.float32)
            differ = narrow != (value - slack).to(tl.float32)
            undecided |= (mask & differ & (is_zero == 0)).to(tl.int32) << block
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


@functools.lru_cache(maxsize=4096)
def _job(
    shape: tuple[int, int], stride: tuple[int, int], size: int, offset: int
) -> tuple[int, ...]:
    """What a table says of a basis beside its address; q runs along contiguous memory, if long."""
    row, col = (shape[0], stride[0], offset), (shape[1], stride[1], 0)
    contiguous, other = (row, col) if stride[0] < stride[1] else (col, row)
    along_other = contiguous[0] < LONG and other[0] > contiguous[0]
    q, p = (other, contiguous) if along_other else (contiguous, other)
    norm = float_bits(math.sqrt(2.0 / (size + 1)))
    return (p[0], q[0], p[1], q[1], p[2], q[2], size + 1, norm)


def dst_fill(
    outs: Sequence[torch.Tensor],
    transposed: bool,
    sizes: Sequence[int],
    scales: torch.Tensor | None = None,
    offset: int = 0,
) -> None:
    """Writes rows [offset, offset + length) of the basis of `sizes[k]` to `outs[k]` [length, rank],
    or [rank, length] if `transposed`, times `scales[k]` (float64) if given.

    All of one dtype and device.
    """
    turn = slice(None, None, -1 if transposed else 1)
    jobs = {
        k: _job(tuple(out.shape)[turn], out.stride()[turn], sizes[k], offset)
        for k, out in enumerate(outs)
        if out.numel()
    }
    if not jobs:
        return
    device, dtype = outs[0].device, outs[0].dtype
    base, origin = anchor(outs[0])
    tiles = sum(-(-p // BLOCK_P) * -(-q // BLOCK_Q) for p, q, *_ in jobs.values())
    steps = min(max(1, triton.next_power_of_2(tiles // ENOUGH_PROGRAMS)), MOST_STEPS)
    groups: dict[tuple[bool, bool], list[list[int]]] = {}
    programs: dict[tuple[bool, bool], int] = {}
    for k, job in jobs.items():
        p, q, p_stride, q_stride, *_ = job
        group = (q_stride == 1, q_stride != 1 == p_stride)
        first = programs.get(group, 0)
        groups.setdefault(group, []).append([first, outs[k].data_ptr() - origin, *job, k])
        programs[group] = first + -(-p // BLOCK_P) * -(-q // (BLOCK_Q * steps))
    for group, table in zip(groups, upload(device, *groups.values()), strict=True):
        q_contiguous, p_contiguous = group
        count = len(groups[group])
        dst_fill_kernel[(programs[group],)](
            table,
            base,
            base if scales is None else scales,
            count,
            steps,
            OUT=TRITON_DTYPES[dtype],
            Q_CONTIGUOUS=q_contiguous,
            P_CONTIGUOUS=p_contiguous,
            HAS_SCALE=scales is not None,
            EXACT=dtype == torch.float64,
            SLOTS=slots(count),
            BLOCK_P=BLOCK_P,
            BLOCK_Q=BLOCK_Q,
            num_warps=8,
            enable_fp_fusion=False,
        )


def dst_basis_(
    out: torch.Tensor, size: int, offset: int, scale: torch.Tensor | None = None
) -> None:
    """Writes rows [offset, offset + len(out)) of the basis of `size` into `out`, of any strides."""
    scales = None if scale is None else scale.reshape(1).to(torch.float64)
    dst_fill([out], False, [size], scales, offset)
