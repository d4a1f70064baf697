"""`lora::_dst_basis_` on a GPU, for one basis or for the A and B of a whole model.

An entry is g · sin((p+1)(q+1)π/N). A program takes 16 p and walks along q in blocks of 128, where
angle addition gives an entry for two float64 operations from the sines of the block's first column
and those of the steps inside of a block. That is right to about 1e-15, not to the last bit: where
two neighbours of the value would round differently (once in some 10^7 entries), the tile is taken
from the table of exact sines. Bytes: the output once; the tables stay in the L2 cache.

Gathering every entry from the table would need 32 cache lines a warp, 4 to 8 times what
the memory takes (estimated, not measured).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .jobs import aligned, anchor, find_job, float_bits, load_float, slots, tensor_at, upload
from .sine import cos_pi, sin_pi

TABLE_BLOCK = 256
BLOCK_P, BLOCK_Q, STEPS = 16, 128, 8
FIELDS = tl.constexpr(12)
TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class Basis:
    """Rows [offset, offset + len(out)) of the basis of `size` go to `out` [length, rank]."""

    out: torch.Tensor
    size: int
    offset: int = 0


@triton.jit
def sine_tables_kernel(tables, sizes, BLOCK: tl.constexpr):
    """For each (N, base) of `sizes`: tables[base:] = sin(πp/N), then cos(πp/N), p in [0, 2N)."""
    n = tl.load(sizes + 2 * tl.program_id(1))
    out = tables + tl.load(sizes + 2 * tl.program_id(1) + 1)
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = p < 2 * n
    tl.store(out + p, sin_pi(p, n), mask=mask)
    tl.store(out + 2 * n + p, cos_pi(p, n), mask=mask)


@triton.jit
def dst_fill_kernel(
    jobs,
    base,
    tables,
    scales,
    count,
    OUT: tl.constexpr,
    Q_CONTIGUOUS: tl.constexpr,
    P_CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    STEPS: tl.constexpr,
):
    program = tl.program_id(0)
    k = find_job(jobs, count, program, FIELDS, SLOTS)
    job = jobs + k * FIELDS
    chunk = program - tl.load(job)
    out = tensor_at(base, tl.load(job + 1), OUT, ALIGNED)
    p_size, q_size = tl.load(job + 2), tl.load(job + 3)
    p_stride, q_stride = tl.load(job + 4), tl.load(job + 5)
    if P_CONTIGUOUS:
        p_stride = 1
        if ALIGNED:
            p_size, q_stride = aligned(p_size, 16), aligned(q_stride, 16)
    if Q_CONTIGUOUS:
        q_stride = 1
        if ALIGNED:
            q_size, p_stride = aligned(q_size, 16), aligned(p_stride, 16)
    n = tl.load(job + 8)
    sines = tables + tl.load(job + 9)
    cosines = sines + 2 * n
    norm = load_float(job + 10)
    scale = norm * 0.0 + 1.0
    if HAS_SCALE:
        scale = tl.load(scales + tl.load(job + 11))
    gain = norm * scale
    # 16 float64 ulp: above the errors of both ways to an entry.
    slack = tl.abs(gain) * 1.8e-15
    zero = tl.abs(gain) * 1e-10  # below the smallest sine but 0 of any size under 2^30

    q_chunks = tl.cdiv(q_size, BLOCK_Q * STEPS)
    p = chunk // q_chunks * BLOCK_P + tl.arange(0, BLOCK_P)  # [BLOCK_P]
    q_begin = chunk % q_chunks * (BLOCK_Q * STEPS)
    step = tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    a = p + tl.load(job + 6) + 1
    inside = (a[:, None] * step[None, :]) % (2 * n)  # [BLOCK_P, BLOCK_Q]
    inside_sine = tl.load(sines + inside)
    inside_cosine = tl.load(cosines + inside)
    for block in range(STEPS):
        q0 = q_begin + block * BLOCK_Q
        if q0 < q_size:
            b0 = q0 + tl.load(job + 7) + 1
            start = (a * b0) % (2 * n)
            sine = gain * tl.load(sines + start)  # [BLOCK_P]
            cosine = gain * tl.load(cosines + start)
            value = sine[:, None] * inside_cosine + cosine[:, None] * inside_sine
            mask = (p < p_size)[:, None] & (q0 + step < q_size)[None, :]
            below, above = (value - slack).to(tl.float32), (value + slack).to(tl.float32)
            is_zero = tl.abs(value) < zero
            value = tl.where(is_zero, gain * 0.0, value)
            undecided = mask & (below != above) & (is_zero == 0)
            if EXACT or tl.max(tl.max(undecided.to(tl.int32), 1), 0) > 0:
                index = (a[:, None] * (b0 + step)[None, :]) % (2 * n)
                value = (norm * tl.load(sines + index, mask=mask, other=0.0)) * scale
            where = p[:, None].to(tl.int64) * p_stride + (q0 + step)[None, :] * q_stride
            if tl.float64 == OUT:
                tl.store(out + where, value, mask=mask)
            else:  # by float32, as the reference's conversion
                tl.store(out + where, value.to(tl.float32).to(OUT), mask=mask)


def _job(basis: Basis) -> tuple[list[int], bool]:
    """What the kernel's table says of `basis`; q runs along its longer side."""
    (rows, cols), (row_stride, col_stride) = basis.out.shape, basis.out.stride()
    row, col = (rows, row_stride, basis.offset), (cols, col_stride, 0)
    (p, p_stride, p_first), (q, q_stride, q_first) = (col, row) if rows > cols else (row, col)
    return [basis.out.data_ptr(), p, q, p_stride, q_stride, p_first, q_first, basis.size + 1]


def sine_tables(sizes: Iterable[int], device: torch.device) -> tuple[torch.Tensor, dict[int, int]]:
    """Float64 sines and cosines of πp/N for each N of `sizes`, and where each N's begin."""
    base_of, end = {}, 0
    for n in sizes:
        base_of[n] = end
        end += 4 * n
    tables = torch.empty(end, dtype=torch.float64, device=device)
    table = upload([[n, base] for n, base in base_of.items()], device)
    grid = (triton.cdiv(2 * max(base_of), TABLE_BLOCK), len(base_of))
    sine_tables_kernel[grid](tables, table, BLOCK=TABLE_BLOCK, enable_fp_fusion=False)
    return tables, base_of


def dst_fill(bases: Sequence[Basis], scales: torch.Tensor | None = None) -> None:
    """Writes `bases`, of one dtype and device, the k-th times `scales[k]` (float64) if given."""
    jobs = {k: _job(basis) for k, basis in enumerate(bases) if basis.out.numel()}
    if not jobs:
        return
    device, dtype = bases[0].out.device, bases[0].out.dtype
    base, origin = anchor(bases[0].out)
    tables, base_of = sine_tables(dict.fromkeys(job[-1] for job in jobs.values()), device)
    groups: dict[tuple[bool, bool, bool], list[int]] = {}
    for k, (address, p, q, p_stride, q_stride, *_) in jobs.items():
        # What the compiler needs for 16-byte accesses, whichever side is contiguous.
        places = (address, q, p_stride) if q_stride == 1 else (address, p, q_stride)
        aligned = all(place % 16 == 0 for place in places)
        groups.setdefault((q_stride == 1, q_stride != 1 == p_stride, aligned), []).append(k)
    for (q_contiguous, p_contiguous, aligned), members in groups.items():
        rows, programs = [], 0
        for k in members:
            address, p, q, *_, n = jobs[k]
            rows.append(
                [
                    programs,
                    address - origin,
                    *jobs[k][1:],
                    base_of[n],
                    float_bits(math.sqrt(2.0 / n)),
                    k,
                ]
            )
            programs += triton.cdiv(p, BLOCK_P) * triton.cdiv(q, BLOCK_Q * STEPS)
        dst_fill_kernel[(programs,)](
            upload(rows, device),
            base,
            tables,
            tables if scales is None else scales,
            len(rows),
            OUT=TRITON_DTYPES[dtype],
            Q_CONTIGUOUS=q_contiguous,
            P_CONTIGUOUS=p_contiguous,
            ALIGNED=aligned and (q_contiguous or p_contiguous),
            HAS_SCALE=scales is not None,
            EXACT=dtype == torch.float64,
            SLOTS=slots(len(rows)),
            BLOCK_P=BLOCK_P,
            BLOCK_Q=BLOCK_Q,
            STEPS=STEPS,
            enable_fp_fusion=True,
        )


def dst_basis_(
    out: torch.Tensor, size: int, offset: int, scale: torch.Tensor | None = None
) -> None:
    """Writes rows [offset, offset + len(out)) of the basis of `size` into `out`, of any strides."""
    scales = None if scale is None else scale.reshape(1).to(torch.float64)
    dst_fill([Basis(out, size, offset)], scales)
