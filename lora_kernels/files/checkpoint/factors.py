"""Intermediate storage of starts: factors in files of bytes, numbers in the journal's records."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..._utils.safetensors import DTYPES, Entry, dtype_name, render
from ...init import Start
from ...layers.state import LayerState
from ..io.blocks import BLOCK
from ..io.buffers import memory_of
from ..io.journal import Record


@dataclass(frozen=True)
class StartRecord:
    """A start without its factors.

    `kept`: it is subtracted from the base and cannot be recomputed from `beta`. `has_R`: it trains
    an R. `offset`: that of its factors in their file.
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
    offset: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the factors, in the order of the file."""
        rows, cols = self.shape
        shapes = {"lora_A": (self.r, cols), "lora_B": (rows, self.r)}
        if self.has_R:
            shapes["lora_R"] = (self.r, self.r)
        if self.kept and self.residual == "implicit":
            shapes |= {"start_A": shapes["lora_A"], "start_B": shapes["lora_B"]}
        return shapes

    @property
    def size(self) -> int:
        """The bytes of its factors."""
        itemsize = DTYPES[self.dtype].itemsize
        return sum(itemsize * a * b for a, b in self.shapes.values())

    def state(self) -> LayerState:
        """The layer with factors on the meta device: shapes and dtypes only."""
        factors = {
            name: torch.empty(shape, dtype=DTYPES[self.dtype], device="meta")
            for name, shape in self.shapes.items()
        }
        if self.kept:  # in an adapter of the residual base A and B serve as the start, too
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
    """The factors of one shard's layers, in the order in which they were made."""

    def __init__(self, path: Path) -> None:
        self._records: list[StartRecord] = []
        self._lock = threading.Lock()
        self._file: BinaryIO = path.open("wb")

    def append(self, record: StartRecord, start: Start) -> None:
        """Writes the factors of a layer that `record.shapes` names."""
        factors = {"lora_A": start.lora_A, "lora_B": start.lora_B}
        factors |= {"start_A": start.right(), "start_B": start.lora_B}
        if start.lora_R is not None:
            factors["lora_R"] = start.lora_R
        with self._lock:
            self._records.append(replace(record, offset=self._file.tell()))
            for name in record.shapes:
                self._file.write(memory_of(factors[name]))

    def close(self) -> Record:
        """The record for the journal."""
        self._file.close()
        return {"starts": [asdict(record) for record in self._records]}


def read_records(record: Record) -> list[StartRecord]:
    """The starts of a shard in the journal."""
    return [StartRecord(**r | {"shape": tuple(r["shape"])}) for r in record["starts"]]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    parts: Iterable[tuple[Path, int, int]],
    metadata: dict[str, str],
) -> None:
    """Writes a safetensors file of tensors, which may be on the meta device: their bytes are copied
    from `parts`, (file, offset, size), one after the other.
    """
    entries, position = [], 0
    for name, tensor in tensors.items():
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        entries.append(Entry(name, dtype, shape, position, position + tensor.nbytes))
        position += tensor.nbytes
    layout = render(entries, metadata)
    with path.open("wb") as file:
        file.write(layout.head())
        for part in parts:
            for chunk in _chunks(*part):
                file.write(chunk)
    if path.stat().st_size != layout.file_size:
        raise OSError(f"{path} has a wrong size: the files that it was copied from have changed")


def _chunks(path: Path, offset: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while size > 0 and (chunk := file.read(min(size, BLOCK))):
            size -= len(chunk)
            yield chunk
