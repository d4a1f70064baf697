"""`lora::_subtract_dst_` on a GPU, for one weight or for those of a whole model.

Computes the entries of ΦₙΦₘᵀ by the Christoffel–Darboux identity, like `csrc/cpu/subtract_dst.cpp`:
  Σₖ sin(ka) sin(kb) = [sin((r+1)a) sin(rb) − sin(ra) sin((r+1)b)] / (2 (cos a − cos b)).
Numerator and denominator cancel near a = b, so they are computed in float64: six float64 operations
per entry at any rank, with a reciprocal from float32 and one Newton step. In each row, the column
with the nearest angle gets a separately computed value, from Dirichlet kernels of exact integers.
Bytes: W is read and written once; the tables, 24 bytes per row and column, stay in the caches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .dst_basis import TRITON_DTYPES, dst_basis_
from .jobs import (
    Kind,
    Known,
    aligned,
    anchor,
    field,
    find_job,
    first_programs,
    float_bits,
    integers,
    kind_of,
    slots,
    tensor_at,
    to_float,
    upload,
)
from .sine import cos_pi, sin_pi

AXIS_FIELDS = tl.constexpr(7)
FIELDS = tl.constexpr(11)
AXIS_BLOCK = 128
BLOCK_COLS, GROUP, STAGES = 512, 4, 4
# Rows per program: many, because a program first reads 24 bytes per column, 12 KB; few, if there
# would otherwise be too few programs.
FEW_ROWS, MANY_ROWS = 32, 128
ENOUGH_PROGRAMS = 4096
FLOAT64_ROWS = 1024  # rows of Φ in memory at a time, for float64 weights


class Placement(NamedTuple):
    """The position of a tensor in the whole weight, of which it may be a shard."""

    global_rows: int
    global_cols: int
    row_offset: int = 0
    col_offset: int = 0

    def transposed(self) -> Placement:
        """The position of the transposed tensor in the transposed weight."""
        return Placement(self.global_cols, self.global_rows, self.col_offset, self.row_offset)


@triton.jit
def _axis(axis, K: tl.constexpr, ONE: tl.constexpr):
    """Field K of an axis. If ONE, `axis` has the fields of both axes of one weight."""
    value = field(axis, K, ONE)
    if ONE:
        value = tl.where(tl.program_id(1) == 0, value, field(axis, K + AXIS_FIELDS, ONE))
    return value


@triton.jit(do_not_specialize=["axes"])
def axis_tables_kernel(tables, axes, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """Five values for each index i of an axis, with a = (i+1)π/(size+1): low = sin(ra),
    high = sin((r+1)a), cos a, the index on the other axis whose angle b is nearest, and
    Σₖ sin(ka) sin(kb) for that b.
    """
    axis = axes
    if not ONE:
        axis = axes + tl.program_id(1) * AXIS_FIELDS
    length, offset, size = _axis(axis, 0, ONE), _axis(axis, 1, ONE), _axis(axis, 2, ONE)
    other, other_offset = _axis(axis, 3, ONE), _axis(axis, 4, ONE)
    rank, out = _axis(axis, 5, ONE), tables + _axis(axis, 6, ONE)
    n, m = size + 1, other + 1
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = k < length
    i = offset + tl.minimum(k, length - 1) + 1
    tl.store(out + k, sin_pi((rank * i) % (2 * n), n), mask=mask)
    tl.store(out + length + k, sin_pi(((rank + 1) * i) % (2 * n), n), mask=mask)
    tl.store(out + 2 * length + k, cos_pi(i, n), mask=mask)
    j = (2 * i * m + n) // (2 * n)  # i m / n, rounded
    tl.store(out + 3 * length + k, (j - 1 - other_offset).to(tl.float64), mask=mask)
    # u = (a − b) / 2 = π t / (2nm) exactly. v = (a + b) / 2 is computed as a − u, so that no
    # product here exceeds 2^62.
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


@triton.jit(do_not_specialize=["jobs", "count", "groups"])
def subtract_kernel(
    jobs,
    firsts,
    base,
    tables,
    coefficients,
    count,
    groups,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program handles `groups` groups of GROUP rows, in BLOCK_COLS columns."""
    chunk = tl.program_id(0)
    ONE: tl.constexpr = firsts is None
    job = jobs
    if not ONE:
        k = find_job(firsts, count, chunk, SLOTS)
        job = jobs + k * FIELDS
        chunk -= tl.load(firsts + k)
    weight = tensor_at(base, field(job, 0, ONE), DTYPE, VECTOR > 0)
    rows, cols = field(job, 1, ONE), field(job, 2, ONE)
    row_stride, col_stride = field(job, 3, ONE), field(job, 4, ONE)
    if VECTOR > 0:  # see _job
        row_stride = aligned(row_stride, VECTOR)
        cols = aligned(cols, VECTOR)
        col_stride = 1
    row_table, col_table = tables + field(job, 5, ONE), tables + field(job, 6, ONE)
    scale = 0.5 * to_float(field(job, 7, ONE)) * tl.load(coefficients + field(job, 8, ONE))

    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    j = chunk % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # [BLOCK_COLS]
    in_cols = j < cols
    low_j = tl.load(col_table + j, mask=in_cols, other=0.0)
    high_j = tl.load(col_table + cols + j, mask=in_cols, other=0.0)
    cos_j = tl.load(col_table + 2 * cols + j, mask=in_cols, other=2.0)
    coarse_j = cos_j.to(tl.float32)
    fine_j = (cos_j - coarse_j.to(tl.float64)).to(tl.float32)
    first_row = chunk // col_blocks * (groups * GROUP)
    for group in tl.range(groups, num_stages=STAGES):
        i = first_row + group * GROUP + tl.arange(0, GROUP)  # [GROUP]
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
        # A float32 reciprocal of the difference, accurate to float32 because the cosines are split
        # into two floats; a Newton step doubles the digits. Converting the difference from float64
        # to float32 would cost four float64 operations.
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
    """W_k −= coefficients[k] · ΦₙΦₘᵀ, or the corresponding part for a shard, in two steps.

    The constructor launches the computation of the tables of sines. `run` then changes the weights,
    with one launch per dtype and layout.
    """

    def __init__(self, weights: Sequence[torch.Tensor], rank: int, tensors: Known) -> None:
        """For whole weights; `tensors` is `known(weights)`."""
        self.rank = rank
        self.products: list[tuple[int, torch.Tensor, Placement]] = []
        self.launches: list[_Launch] = []
        if any(kind.dtype == torch.float64 for kind in tensors.kinds):
            self.products = [
                (k, weight, Placement(*weight.shape))
                for k, weight in enumerate(weights)
                if weight.dtype == torch.float64
            ]
        if len(self.products) < len(weights):
            self._prepare(weights[0].device, tensors)

    @classmethod
    def of_one(cls, weight: torch.Tensor, rank: int, place: Placement) -> Subtraction:
        """For one weight, which may be a shard. It is described by arguments instead of a table."""
        self = cls.__new__(cls)
        self.rank, self.products, self.launches = rank, [], []
        if weight.dtype == torch.float64:
            self.products = [(0, weight, place)]
        elif weight.numel():
            self._prepare_one(weight, place)
        return self

    def _prepare_one(self, weight: torch.Tensor, place: Placement) -> None:
        row_axis, col_axis, job, vector = _job(kind_of(weight), place)
        rows, cols, col_blocks = job[1], job[2], job[-1]
        job[6] = 5 * rows
        axes = (*row_axis, self.rank, 0, *col_axis, self.rank, 5 * rows)
        self._make_tables(weight.device, axes, 2, max(rows, cols), 5 * (rows + cols))
        few = -(-rows // FEW_ROWS) * col_blocks
        groups = _rows_a_program(few) // _group(vector)
        programs = -(-rows // (groups * _group(vector))) * col_blocks
        dtype, job = weight.dtype, tuple(job)
        self.launches.append(_Launch(dtype, vector, programs, job, None, weight, 1, groups))

    def _prepare(self, device: torch.device, tensors: Known) -> None:
        axes: dict[
            tuple[int, ...], int
        ] = {}  # (length, offset, size, other size, other offset) -> place in the tables
        groups: dict[tuple[torch.dtype, int], int] = {}
        end = 0

        def row(kind: Kind) -> list[int]:
            nonlocal end
            if kind.dtype == torch.float64:
                return [0] * 10 + [-1]
            *both, job, vector = _job(kind, Placement(*kind.shape))
            for axis in both:
                if axis not in axes:
                    axes[axis] = end
                    end += 5 * axis[0]
            job[5:7] = map(axes.__getitem__, both)
            return [*job, groups.setdefault((kind.dtype, vector), len(groups))]

        rows = tensors.rows(row)
        base, origin = anchor(device)
        torch.sub(tensors.addresses, origin, out=rows[:, 0])
        torch.arange(len(rows), out=rows[:, 8])
        tables = [integers([x for axis, at in axes.items() for x in (*axis, self.rank, at)])]
        launches = []
        for (dtype, vector), number in groups.items():
            mine = rows if len(tensors.kinds) == 1 else rows[rows[:, 10] == number]
            length, col_blocks = mine[:, 1], mine[:, 9]
            few = int(((length + FEW_ROWS - 1) // FEW_ROWS * col_blocks).sum())
            some = _rows_a_program(few)
            first, programs = first_programs((length + some - 1) // some * col_blocks)
            tables += [mine, first]
            launches.append((dtype, vector, programs, len(mine), some // _group(vector)))
        axis_table, *tables = upload(device, *tables)
        self._make_tables(device, axis_table, len(axes), max(axis[0] for axis in axes), end)
        pairs = zip(tables[::2], tables[1::2], strict=True)
        for launch, (jobs, firsts) in zip(launches, pairs, strict=True):
            dtype, vector, programs, count, some = launch
            self.launches.append(_Launch(dtype, vector, programs, jobs, firsts, base, count, some))

    def _make_tables(
        self, device: torch.device, axes: object, count: int, longest: int, size: int
    ) -> None:
        self.tables = torch.empty(size, dtype=torch.float64, device=device)
        axis_tables_kernel[(-(-longest // AXIS_BLOCK), count)](
            self.tables,
            axes,
            ONE=isinstance(axes, tuple),
            BLOCK=AXIS_BLOCK,
            enable_fp_fusion=False,
        )

    def run(self, coefficients: torch.Tensor) -> None:
        """Subtract; `coefficients` [len] are float64 on the device."""
        for k, weight, place in self.products:
            _subtract_product(weight, coefficients[k], self.rank, place)
        for each in self.launches:
            subtract_kernel[(each.programs,)](
                each.jobs,
                each.firsts,
                each.base,
                self.tables,
                coefficients,
                each.count,
                each.groups,
                DTYPE=TRITON_DTYPES[each.dtype],
                VECTOR=each.vector,
                SLOTS=slots(each.count),
                BLOCK_COLS=BLOCK_COLS,
                GROUP=_group(each.vector),
                STAGES=STAGES,
                maxnreg=None if each.vector else 168,  # by default ptxas spills for sm_80
                enable_fp_fusion=True,
            )


class _Launch(NamedTuple):
    """The arguments of one launch of `subtract_kernel`."""

    dtype: torch.dtype
    vector: int
    programs: int
    jobs: torch.Tensor | tuple[int, ...]
    firsts: torch.Tensor | None
    base: torch.Tensor
    count: int
    groups: int


def _group(vector: int) -> int:
    """The number of rows that a program loads at a time."""
    return GROUP if vector else GROUP // 2  # with GROUP, registers would spill


def _rows_a_program(few: int) -> int:
    """The rows per program; `few` is the number of programs with FEW_ROWS each."""
    return MANY_ROWS if few >= ENOUGH_PROGRAMS * MANY_ROWS // FEW_ROWS else FEW_ROWS


def _job(kind: Kind, place: Placement) -> tuple:
    """(row axis, column axis, job, entries per 16-byte access or 0) of a weight or its transpose.
    The job has zeros for the address, the positions of the axes' tables and the coefficient's
    index. Its last field is the number of blocks of columns.
    """
    _, shape, stride, is_aligned = kind
    if stride[0] < stride[1]:
        shape, stride, place = shape[::-1], stride[::-1], place.transposed()
    rows, cols = shape
    n, m, i, j = place.global_rows, place.global_cols, place.row_offset, place.col_offset
    norm = float_bits(2.0 / math.sqrt((n + 1) * (m + 1)))
    # For 16-byte accesses, every row must begin and end at a multiple of 16 bytes.
    count = 16 // kind.dtype.itemsize
    fits = is_aligned and stride[1] == 1 and stride[0] % count == 0 and cols % count == 0
    job = [0, rows, cols, *stride, 0, 0, norm, 0, -(-cols // BLOCK_COLS)]
    return (rows, i, n, m, j), (cols, j, m, n, i), job, count if fits else 0


def _subtract_product(
    weight: torch.Tensor, coefficient: torch.Tensor, rank: int, place: Placement
) -> None:
    """For float64 weights: a product, because the identity loses float64 digits near a = b."""
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
    """W −= coefficient · the part of ΦₙΦₘᵀ that begins at the offsets."""
    place = Placement(global_rows, global_cols, row_offset, col_offset)
    Subtraction.of_one(weight, rank, place).run(coefficient.reshape(1).to(torch.float64))
