"""One launch for many tensors: a table of integers on the device says what each program works on.

A table has a row of int64 a tensor; column 0 is the number of the tensor's first program.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

RESERVE = 65536  # integers: the tables of a whole model's start, several times
_reserves: list[torch.Tensor] = []  # pinned; the last is what may be used, the others are in graphs


def upload(device: torch.device, *tables: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The tables on the device by one copy that is not waited for, nor in a CUDA graph's way."""
    flat = [value for table in tables for row in table for value in row]
    # On the CPU whatever the default device is.
    memory = torch.tensor(flat, dtype=torch.int64, device="cpu")
    if device.type == "cuda":
        memory = _pinned(memory).to(device, non_blocking=True)
    return list(memory.split([sum(map(len, table)) for table in tables]))


def _pinned(table: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory; while a graph is captured from what was set apart before, as nothing
    may be pinned then, and of which no part is used twice, as every replay reads it again.
    """
    capturing = torch.cuda.is_current_stream_capturing()
    if not capturing:
        if not _reserves or len(_reserves[-1]) < RESERVE:
            options = {"dtype": torch.int64, "device": "cpu", "pin_memory": True}
            with torch.inference_mode(False):
                _reserves.append(torch.empty(2 * RESERVE, **options))
        return table.pin_memory()
    if not _reserves or len(_reserves[-1]) < len(table):
        raise RuntimeError(
            "lora_kernels: too little memory was set apart for this CUDA graph; run the same call "
            "once before the capture (a warm-up), and capture fewer weights at a time"
        )
    left = _reserves[-1]
    _reserves[-1] = left[len(table) :]
    return left[: len(table)].copy_(table)


def float_bits(value: float) -> int:
    """A float64 as it goes into a table; `load_float` reads it."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def anchor(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A uint8 tensor at a multiple of 16 and its address, which `tensor_at` counts from."""
    base = torch.empty(16, dtype=torch.uint8, device=tensor.device)
    return base, base.data_ptr()


def slots(count: int) -> int:
    """The number of table rows that `find_job` is compiled for."""
    return max(16, triton.next_power_of_2(count))


@triton.jit
def find_job(jobs, count, program, FIELDS: tl.constexpr, SLOTS: tl.constexpr):
    """-> the last row whose first program is <= `program`."""
    k = tl.arange(0, SLOTS)
    first = tl.load(jobs + k * FIELDS, mask=k < count, other=9223372036854775807)
    return tl.sum((first <= program).to(tl.int32), 0) - 1


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
def load_float(table):
    """The float64 of `float_bits`."""
    return tl.load(table).to(tl.float64, bitcast=True)
