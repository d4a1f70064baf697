"""One launch for many tensors: a table of integers on the device says what each program works on.

A table has a row of int64 a tensor; the tensors' first programs are in an array of their own,
which every program searches. A single tensor's row is passed as arguments: no table, no copy.

The host fills a table while the device waits: rows are made once for each kind of tensor (shape,
strides, dtype) and then gathered, with no Python for each number.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

RESERVE = 65536  # integers: the tables of a whole model's start, several times
ALIGNMENT = 2  # integers: tables begin at multiples of 16 bytes, or a kernel is compiled twice
_reserves: list[torch.Tensor] = []  # pinned; the last is what may be used, the others are in graphs


def upload(device: torch.device, *tables: torch.Tensor) -> list[torch.Tensor]:
    """The int64 tables, which are on the CPU, flat on the device by one copy, which is not waited
    for, nor in a CUDA graph's way.
    """
    sizes = [-(-table.numel() // ALIGNMENT) * ALIGNMENT for table in tables]
    memory = _pinned(sum(sizes)) if device.type == "cuda" else _plain(sum(sizes))
    for table, part in zip(tables, memory.split(sizes), strict=True):
        part[: table.numel()].view_as(table).copy_(table)
    if device.type == "cuda":
        memory = memory.to(device, non_blocking=True)
    return list(memory.split(sizes))


def _plain(count: int, **options) -> torch.Tensor:
    # On the CPU whatever the default device is.
    return torch.empty(count, dtype=torch.int64, device="cpu", **options)


def _pinned(count: int) -> torch.Tensor:
    """Pinned memory for `count` integers; while a graph is captured out of what was set apart
    before, as nothing may be pinned then, and no part twice, as every replay reads it again.
    """
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing:
        if not _reserves or len(_reserves[-1]) < RESERVE:
            with torch.inference_mode(False):
                _reserves.append(_plain(2 * RESERVE, pin_memory=True))
        return _plain(count, pin_memory=True)
    if not _reserves or len(_reserves[-1]) < count:
        raise RuntimeError(
            "lora_kernels: too little memory was set apart for this CUDA graph; run the same call "
            "once before the capture (a warm-up), and capture fewer weights at a time"
        )
    left = _reserves[-1]
    _reserves[-1] = left[count:]
    return left[:count]


def integers(values: Iterable[int]) -> torch.Tensor:
    """[len] int64 on the CPU, of at least one value."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


class Kind(NamedTuple):
    """What tensors have in common; `is_aligned`: they begin at multiples of 16 bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_aligned: bool


class Known(NamedTuple):
    """What the host knows of some tensors: their kinds, the number of each's kind, its address."""

    kinds: list[Kind]
    which: torch.Tensor  # [len] int64
    addresses: torch.Tensor  # [len] int64

    def rows(self, row: Callable[[Kind], Sequence[int]]) -> torch.Tensor:
        """[len, fields]: `row(kind)` of each, which is called once for each kind."""
        rows = torch.tensor([row(k) for k in self.kinds], dtype=torch.int64, device="cpu")
        return rows[self.which]


def kind_of(tensor: torch.Tensor) -> Kind:
    """Of one."""
    is_aligned = tensor.data_ptr() % 16 == 0
    return Kind(tensor.dtype, tensor.shape, tensor.stride(), is_aligned)


def known(tensors: Sequence[torch.Tensor]) -> Known:
    """Of at least one."""
    which, addresses, firsts = torch.ops.lora._tensor_kinds(tensors)
    return Known([kind_of(tensors[k]) for k in firsts], which, addresses)


def first_programs(programs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(each tensor's first program, the number of all), from how many each has."""
    ends = programs.cumsum(0)
    return ends - programs, int(ends[-1])


def float_bits(value: float) -> int:
    """A float64 as it goes into a table; `to_float` reads it."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@functools.cache
def anchor(device: torch.device) -> tuple[torch.Tensor, int]:
    """A uint8 tensor at a multiple of 16 and its address, which `tensor_at` counts from."""
    with torch.inference_mode(False):
        base = torch.empty(16, dtype=torch.uint8, device=device)
    return base, base.data_ptr()


def slots(count: int) -> int:
    """The number of table rows that `find_job` is compiled for."""
    return max(16, 1 << (count - 1).bit_length())


@triton.jit
def find_job(firsts, count, program, SLOTS: tl.constexpr):
    """-> the last row whose first program is <= `program`."""
    k = tl.arange(0, SLOTS)
    first = tl.load(firsts + k, mask=k < count, other=9223372036854775807)
    return tl.sum((first <= program).to(tl.int32), 0) - 1


@triton.jit
def field(job, K: tl.constexpr, ONE: tl.constexpr):
    """Field K of a job: a row of a table or, if there is but one, a tuple of arguments."""
    if ONE:
        return job[K].to(tl.int64)
    else:
        return tl.load(job + K)


@triton.jit
def aligned(x, COUNT: tl.constexpr):
    """x, which is a multiple of COUNT, so that the compiler knows it.

    Arithmetic, because `tl.multiple_of` on an argument is lost when the function is inlined.
    """
    return x // COUNT * COUNT


@triton.jit
def tensor_at(base, offset, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor that lies `offset` bytes from `base`, a uint8 pointer at a multiple of 16."""
    if ALIGNED:
        offset = aligned(offset, 16)
    return (base + offset).to(tl.pointer_type(DTYPE), bitcast=True)


@triton.jit
def to_float(bits):
    """The float64 of `float_bits`."""
    return bits.to(tl.float64, bitcast=True)
