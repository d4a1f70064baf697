"""`lora::_subtract_dst_` on a GPU, for one weight or for those of a whole model.

The entries of ΦₙΦₘᵀ by the Christoffel–Darboux identity, as `csrc/cpu/subtract_dst.cpp` has it:
  Σₖ sin(ka) sin(kb) = [sin((r+1)a) sin(rb) − sin(ra) sin((r+1)b)] / (2 (cos a − cos b)).
Numerator and denominator cancel near a = b, so they are float64: six float64 operations an entry at
any rank, with the reciprocal from float32 and one Newton step. The column whose angle is nearest to
the row's takes a value of its own, from the Dirichlet form on exact integers.
Bytes: a reading and a writing of W; the tables, 24 bytes a row and column, stay in the caches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dst_basis import TRITON_DTYPES, dst_basis_
from .jobs import aligned, anchor, find_job, float_bits, load_float, slots, tensor_at, upload
from .sine import cos_pi, sin_pi

AXIS_FIELDS = tl.constexpr(7)
FIELDS = tl.constexpr(10)
AXIS_BLOCK = 128
BLOCK_COLS, BLOCK_ROWS, GROUP, STAGES = 512, 32, 4, 4
FLOAT64_ROWS = 1024  # rows of Φ in memory at a time, for float64 weights


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies in the whole (perhaps sharded) weight."""

    global_rows: int
    global_cols: int
    row_offset: int = 0
    col_offset: int = 0

    def transposed(self) -> Placement:
        """Of the transposed tensor."""
        return Placement(self.global_cols, self.global_rows, self.col_offset, self.row_offset)


@triton.jit
def axis_tables_kernel(tables, axes, BLOCK: tl.constexpr):
    """For an axis of `size` at a = (i+1)π/(size+1): low = sin(ra), high = sin((r+1)a), cos a; then
    the index on the other axis whose angle is nearest, and Σₖ sin(ka) sin(kb) there.
    """
    axis = axes + tl.program_id(1) * AXIS_FIELDS
    length, offset, size = tl.load(axis), tl.load(axis + 1), tl.load(axis + 2)
    other, other_offset = tl.load(axis + 3), tl.load(axis + 4)
    rank, out = tl.load(axis + 5), tables + tl.load(axis + 6)
    n, m = size + 1, other + 1
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = k < length
    i = offset + tl.minimum(k, length - 1) + 1
    tl.store(out + k, sin_pi((rank * i) % (2 * n), n), mask=mask)
    tl.store(out + length + k, sin_pi(((rank + 1) * i) % (2 * n), n), mask=mask)
    tl.store(out + 2 * length + k, cos_pi(i, n), mask=mask)
    j = (2 * i * m + n) // (2 * n)  # rounded i m / n
    tl.store(out + 3 * length + k, (j - 1 - other_offset).to(tl.float64), mask=mask)
    # u = (a − b) / 2 = π t / (2nm) exactly; v = (a + b) / 2 = a − u, so that no product here
    # passes 2^62.
    q = 2 * rank + 1
    t = i * m - j * n
    phase = (q * tl.abs(t)) % (4 * n * m)
    sine_qu = sin_pi(phase, 2 * n * m)
    ratio_u = tl.where(
        t == 0, q.to(tl.float64), sine_qu / sin_pi(tl.maximum(tl.abs(t), 1), 2 * n * m)
    )
    sine_qu = tl.where(t < 0, -sine_qu, sine_qu)
    cosine_qu = sin_pi((phase + n * m) % (4 * n * m), 2 * n * m)
    qi = (q * i) % (2 * n)
    sine_qv = sin_pi(qi, n) * cosine_qu - cos_pi(qi, n) * sine_qu
    ratio_v = sine_qv / sin_pi(tl.maximum(i * m + j * n, 1), 2 * n * m)
    tl.store(out + 4 * length + k, 0.25 * (ratio_u - ratio_v), mask=mask)


@triton.jit
def subtract_kernel(
    jobs,
    base,
    tables,
    coefficients,
    count,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    job = jobs + find_job(jobs, count, program, FIELDS, SLOTS) * FIELDS
    chunk = program - tl.load(job)
    weight = tensor_at(base, tl.load(job + 1), DTYPE, VECTOR > 0)
    rows, cols = tl.load(job + 2), tl.load(job + 3)
    row_stride, col_stride = tl.load(job + 4), tl.load(job + 5)
    if VECTOR > 0:  # see _job
        row_stride = aligned(row_stride, VECTOR)
        cols = aligned(cols, VECTOR)
        col_stride = 1
    row_table, col_table = tables + tl.load(job + 6), tables + tl.load(job + 7)
    scale = 0.5 * load_float(job + 8) * tl.load(coefficients + tl.load(job + 9))

    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    j = chunk % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    in_cols = j < cols
    low_j = tl.load(col_table + j, mask=in_cols, other=0.0)
    high_j = tl.load(col_table + cols + j, mask=in_cols, other=0.0)
    cos_j = tl.load(col_table + 2 * cols + j, mask=in_cols, other=2.0)
    coarse_j = cos_j.to(tl.float32)
    fine_j = (cos_j - coarse_j.to(tl.float64)).to(tl.float32)
    for group in tl.range(BLOCK_ROWS // GROUP, num_stages=STAGES):
        i = chunk // col_blocks * BLOCK_ROWS + group * GROUP + tl.arange(0, GROUP)  # [GROUP]
        in_rows = i < rows
        low_i = scale * tl.load(row_table + i, mask=in_rows, other=0.0)
        high_i = scale * tl.load(row_table + rows + i, mask=in_rows, other=0.0)
        cos_i = tl.load(row_table + 2 * rows + i, mask=in_rows, other=3.0)
        nearest = tl.load(row_table + 3 * rows + i, mask=in_rows, other=-1.0).to(tl.int64)
        special = 2.0 * scale * tl.load(row_table + 4 * rows + i, mask=in_rows, other=0.0)
        coarse_i = cos_i.to(tl.float32)
        fine_i = (cos_i - coarse_i.to(tl.float64)).to(tl.float32)

        where = i[:, None] * row_stride + j[None, :] * col_stride  # [GROUP, BLOCK_COLS]
        mask = in_rows[:, None] & in_cols[None, :]
        before = tl.load(weight + where, mask=mask, other=0.0)
        # A float32 reciprocal of the difference, as exact as float32 (the cosines come in two
        # halves), doubled in digits by a Newton step: conversions cost four float64 operations.
        rough = (coarse_i[:, None] - coarse_j[None, :]) + (fine_i[:, None] - fine_j[None, :])
        is_nearest = j[None, :] == nearest[:, None]
        inverse = (1.0 / tl.where(is_nearest, 1.0, rough)).to(tl.float64)
        difference = cos_i[:, None] - cos_j[None, :]
        inverse = inverse + inverse * (1.0 - difference * inverse)
        numerator = high_i[:, None] * low_j[None, :] - low_i[:, None] * high_j[None, :]
        correction = (numerator * inverse).to(tl.float32)
        correction = tl.where(is_nearest, special.to(tl.float32)[:, None], correction)
        after = before.to(tl.float32) - correction
        tl.store(weight + where, after.to(DTYPE), mask=mask)


class Subtraction:
    """W_k −= coefficients[k] · the part of ΦₙΦₘᵀ that weight k sees, in two steps.

    Making one has the tables of sines computed. `run` then writes the weights, all of one dtype and
    layout in one launch.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        rank: int,
        placements: Sequence[Placement] | None = None,
    ) -> None:
        """`placements` say which part of a larger weight each is; none if they are whole."""
        device = weights[0].device
        self.rank = rank
        self.base, origin = anchor(weights[0])
        self.products: list[tuple[int, torch.Tensor, Placement]] = []
        axes: dict[tuple[int, ...], int] = {}  # (length, offset, size, other, its offset) -> place
        groups: dict[tuple[torch.dtype, int], list[list[int]]] = {}
        self.programs: dict[tuple[torch.dtype, int], int] = {}
        end = 0
        for k, weight in enumerate(weights):
            if weight.numel() == 0:
                continue
            shape, dtype = tuple(weight.shape), weight.dtype
            place = placements[k] if placements else Placement(*shape)
            if dtype == torch.float64:
                self.products.append((k, weight, place))
                continue
            address = weight.data_ptr()
            row_axis, col_axis, strides, norm, vector, programs = _job(
                shape, weight.stride(), place, dtype, address % 16 == 0
            )
            for axis in (row_axis, col_axis):
                if axis not in axes:
                    axes[axis] = end
                    end += 5 * axis[0]
            key = (dtype, vector)
            first = self.programs.get(key, 0)
            at = (first, address - origin, row_axis[0], col_axis[0], *strides)
            groups.setdefault(key, []).append([*at, axes[row_axis], axes[col_axis], norm, k])
            self.programs[key] = first + programs
        axis_rows = [[*axis, rank, place] for axis, place in axes.items()]
        axis_jobs, *jobs = upload(device, axis_rows, *groups.values())
        self.groups = dict(zip(groups, jobs, strict=True))
        self.tables = torch.empty(end, dtype=torch.float64, device=device)
        if axes:
            grid = (triton.cdiv(max(axis[0] for axis in axes), AXIS_BLOCK), len(axes))
            axis_tables_kernel[grid](
                self.tables, axis_jobs, BLOCK=AXIS_BLOCK, enable_fp_fusion=False
            )

    def run(self, coefficients: torch.Tensor) -> None:
        """`coefficients` [len] are float64, on the device."""
        for k, weight, place in self.products:
            _subtract_product(weight, coefficients[k], self.rank, place)
        for (dtype, vector), jobs in self.groups.items():
            count = len(jobs) // FIELDS.value
            subtract_kernel[(self.programs[dtype, vector],)](
                jobs,
                self.base,
                self.tables,
                coefficients,
                count,
                DTYPE=TRITON_DTYPES[dtype],
                VECTOR=vector,
                SLOTS=slots(count),
                BLOCK_COLS=BLOCK_COLS,
                BLOCK_ROWS=BLOCK_ROWS,
                GROUP=GROUP if vector else GROUP // 2,  # or registers spill
                STAGES=STAGES,
                enable_fp_fusion=True,
            )


@functools.lru_cache(maxsize=4096)
def _job(
    shape: tuple[int, int],
    stride: tuple[int, int],
    place: Placement,
    dtype: torch.dtype,
    aligned_: bool,
) -> tuple:
    """Both axes, strides, norm, entries in 16 bytes and programs, of a weight or its transpose."""
    if stride[0] < stride[1]:
        shape, stride, place = shape[::-1], stride[::-1], place.transposed()
    rows, cols = shape
    n, m, i, j = place.global_rows, place.global_cols, place.row_offset, place.col_offset
    norm = float_bits(2.0 / math.sqrt((n + 1) * (m + 1)))
    # What the compiler needs for 16-byte accesses: every row begins and ends at a multiple of that.
    count = 16 // dtype.itemsize
    fits = aligned_ and stride[1] == 1 and stride[0] % count == 0 and cols % count == 0
    programs = triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(cols, BLOCK_COLS)
    return (rows, i, n, m, j), (cols, j, m, n, i), stride, norm, count if fits else 0, programs


def _subtract_product(
    weight: torch.Tensor, coefficient: torch.Tensor, rank: int, place: Placement
) -> None:
    """Float64 weights want float64 corrections, whose digits only the product has near a = b."""
    rows, cols = weight.shape
    options = {"dtype": torch.float64, "device": weight.device}
    right = torch.empty(cols, rank, **options)
    dst_basis_(right, place.global_cols, place.col_offset)
    for begin in range(0, rows, FLOAT64_ROWS):
        block = weight[begin : begin + FLOAT64_ROWS]  # [block, cols]
        left = torch.empty(len(block), rank, **options)
        dst_basis_(left, place.global_rows, place.row_offset + begin, coefficient)
        block.addmm_(left, right.T, alpha=-1)


def subtract_dst_(
    weight: torch.Tensor,
    coefficient: torch.Tensor,
    rank: int,
    global_rows: int,
    global_cols: int,
    row_offset: int,
    col_offset: int,
) -> None:
    """W −= coefficient · the part of ΦₙΦₘᵀ that starts at the offsets."""
    place = Placement(global_rows, global_cols, row_offset, col_offset)
    Subtraction([weight], rank, [place]).run(coefficient.reshape(1).to(torch.float64))
