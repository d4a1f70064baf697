"""The starts that are made on the way: factors as files of bytes, numbers as records."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..init import Start
from ..state import LayerState
from .blocks import BLOCK
from .layout import DTYPES, Entry, dtype_name, render
from .unfinished import Record


@dataclass(frozen=True)
class StartRecord:
    """A start without its factors. `kept`: it is taken out of the base, and not made from `beta`
    again; `has_R`: it trains an R.
    """

    name: str
    r: int
    shape: tuple[int, int]
    dtype: str
    scaling: float
    lora_alpha: float
    weight_norm: float
    residual: str
    beta: float | None
    kept: bool
    has_R: bool

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the factors, in the order of the file."""
        rows, cols = self.shape
        shapes = {"lora_A": (self.r, cols), "lora_B": (rows, self.r)}
        if self.has_R:
            shapes["lora_R"] = (self.r, self.r)
        if self.kept and self.residual == "implicit":
            shapes |= {"start_A": shapes["lora_A"], "start_B": shapes["lora_B"]}
        return shapes

    def state(self) -> LayerState:
        """The layer with factors on the meta device: shapes and dtypes only."""
        factors = {
            name: torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")
            for name, shape in self.shapes.items()
        }
        if self.kept:  # in the residual base's adapter they are A and B themselves
            factors = {"start_A": factors["lora_A"], "start_B": factors["lora_B"]} | factors
        return LayerState(
            **factors,
            scaling=self.scaling,
            lora_alpha=self.lora_alpha,
            beta=self.beta,
            residual=self.residual,
            weight_norm=self.weight_norm,
        )


class FactorFile:
    """The factors of one shard's layers, one after the other; written on one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[StartRecord] = []
        self._file: BinaryIO = path.open("wb")

    def append(self, record: StartRecord, start: Start) -> None:
        """A layer's, those of the start again where they are kept beside what trains."""
        factors = {"lora_A": start.lora_A, "lora_B": start.lora_B, "lora_R": start.lora_R}
        factors |= {"start_A": start.right(), "start_B": start.lora_B}
        for name in record.shapes:
            self._file.write(memory_of(factors[name]))
        self.records.append(record)

    def close(self) -> Record:
        """Waits for the disk; what the journal is to say."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"starts": [asdict(record) for record in self.records]}


def read_records(record: Record) -> list[StartRecord]:
    """Those of a journalled shard."""
    return [StartRecord(**r | {"shape": tuple(r["shape"])}) for r in record["starts"]]


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU and contiguous; not to be used longer than the tensor."""
    tensor = tensor.detach().to("cpu").contiguous()
    size = tensor.numel() * tensor.element_size()
    view = (ctypes.c_char * size).from_address(tensor.data_ptr() if size else 1)
    view.owner = tensor
    return memoryview(view)


def write_tensors(
    path: Path,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    parts: Iterable[Path],
    metadata: dict[str, str],
) -> None:
    """A safetensors file of (name, dtype, shape) whose bytes are those of `parts`, in order."""
    entries, position = [], 0
    for name, dtype, shape in tensors:
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        entries.append(Entry(name, dtype, shape, position, position + size))
        position += size
    layout = render(entries, metadata)
    with path.open("wb") as file:
        file.write(layout.head())
        for chunk in _chunks(parts):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_size != layout.file_size:
        raise OSError(f"{path} did not become what it was to be: files in it were changed")


def _chunks(parts: Iterable[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as file:
            while chunk := file.read(BLOCK):
                yield chunk


def meta_entries(tensors: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of tensors that may be on the meta device."""
    return [(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
