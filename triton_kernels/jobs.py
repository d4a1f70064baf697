"""One launch for many tensors: each program finds its work in a table on the device.

A table has one row of int64 per tensor. The index of each tensor's first program is in a separate
array, which every program searches for its own index. For a single tensor, the row is passed as
arguments, without a table.

The device is idle while the host fills a table. To save time, a row is computed once for each kind
of tensor (shape, strides, dtype), and the table is gathered from these rows.
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

RESERVE = 65536  # integers; several times the tables for initializing a whole model
ALIGNMENT = 2  # integers, 16 bytes; for other alignments, kernels would be compiled again
_reserves: list[torch.Tensor] = []  # pinned; the last is free, CUDA graphs use the others


def upload(device: torch.device, *tables: torch.Tensor) -> list[torch.Tensor]:
    """Copy int64 tables from the CPU to the device, flattened, in one asynchronous copy that also
    works in a CUDA graph.
    """
    sizes = [-(-table.numel() // ALIGNMENT) * ALIGNMENT for table in tables]
    memory = _pinned(sum(sizes)) if device.type == "cuda" else _plain(sum(sizes))
    for table, part in zip(tables, memory.split(sizes), strict=True):
        part[: table.numel()].view_as(table).copy_(table)
    if device.type == "cuda":
        memory = memory.to(device, non_blocking=True)
    return list(memory.split(sizes))


def _plain(count: int, **options) -> torch.Tensor:
    # `device` is given because the default device may be another.
    return torch.empty(count, dtype=torch.int64, device="cpu", **options)


def _pinned(count: int) -> torch.Tensor:
    """Pinned memory for `count` integers. During the capture of a CUDA graph no memory can be
    pinned, so it is taken from a reserve made earlier. It is never reused, because every replay
    reads it.
    """
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing:
        if not _reserves or len(_reserves[-1]) < RESERVE:
            with torch.inference_mode(False):
                _reserves.append(_plain(2 * RESERVE, pin_memory=True))
        return _plain(count, pin_memory=True)
    if not _reserves or len(_reserves[-1]) < count:
        raise RuntimeError(
            "lora_kernels: not enough memory is reserved for this CUDA graph; run the same call "
            "once before the capture (a warm-up), and capture fewer weights at a time"
        )
    left = _reserves[-1]
    _reserves[-1] = left[count:]
    return left[:count]


def integers(values: Iterable[int]) -> torch.Tensor:
    """At least one value as an int64 tensor [len] on the CPU."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


class Kind(NamedTuple):
    """The properties that decide a table's row; `is_aligned`: the address is a multiple of 16."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_aligned: bool


class Known(NamedTuple):
    """Some tensors' distinct kinds and, for each tensor, the index of its kind and its address."""

    kinds: list[Kind]
    which: torch.Tensor  # [len] int64
    addresses: torch.Tensor  # [len] int64

    def rows(self, row: Callable[[Kind], Sequence[int]]) -> torch.Tensor:
        """The table [len, fields] of `row(kind)` for each tensor; `row` is called once per kind."""
        rows = torch.tensor([row(k) for k in self.kinds], dtype=torch.int64, device="cpu")
        return rows[self.which]


def kind_of(tensor: torch.Tensor) -> Kind:
    """The kind of one tensor."""
    is_aligned = tensor.data_ptr() % 16 == 0
    return Kind(tensor.dtype, tensor.shape, tensor.stride(), is_aligned)


def known(tensors: Sequence[torch.Tensor]) -> Known:
    """The kinds and addresses of at least one tensor."""
    which, addresses, firsts = torch.ops.lora._tensor_kinds(tensors)
    return Known([kind_of(tensors[k]) for k in firsts], which, addresses)


def first_programs(programs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(the first program of each tensor, the total), from the number of programs of each."""
    ends = programs.cumsum(0)
    return ends - programs, int(ends[-1])


def float_bits(value: float) -> int:
    """The bits of a float64 as an integer, for a table; `to_float` converts them back."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@functools.cache
def anchor(device: torch.device) -> tuple[torch.Tensor, int]:
    """A uint8 tensor and its address, a multiple of 16, relative to which tables give addresses."""
    with torch.inference_mode(False):
        base = torch.empty(16, dtype=torch.uint8, device=device)
    return base, base.data_ptr()


def slots(count: int) -> int:
    """The number of table rows that `find_job` is compiled for."""
    return max(16, 1 << (count - 1).bit_length())


@triton.jit
def find_job(firsts, count, program, SLOTS: tl.constexpr):
    """The last row whose first program is <= `program`."""
    k = tl.arange(0, SLOTS)
    first = tl.load(firsts + k, mask=k < count, other=9223372036854775807)
    return tl.sum((first <= program).to(tl.int32), 0) - 1


@triton.jit
def field(job, K: tl.constexpr, ONE: tl.constexpr):
    """Field K of a job, which is a row of a table or, if ONE, a tuple of arguments."""
    if ONE:
        return job[K].to(tl.int64)
    else:
        return tl.load(job + K)


@triton.jit
def aligned(x, COUNT: tl.constexpr):
    """Tell the compiler that x is a multiple of COUNT.

    By arithmetic, because `tl.multiple_of` on an argument is lost when the function is inlined.
    """
    return x // COUNT * COUNT


@triton.jit
def tensor_at(base, offset, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the tensor `offset` bytes after `base`, a uint8 pointer at a multiple of 16."""
    if ALIGNED:
        offset = aligned(offset, 16)
    return (base + offset).to(tl.pointer_type(DTYPE), bitcast=True)


@triton.jit
def to_float(bits):
    """The float64 that `float_bits` converted."""
    return bits.to(tl.float64, bitcast=True)
