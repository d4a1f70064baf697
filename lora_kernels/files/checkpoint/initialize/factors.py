"""Intermediate storage of starts: factors in binary files, numbers in the journal's records."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...._utils.safetensors import DTYPES, Entry, dtype_name, render
from ....init import Start
from ....layers.state import LayerState
from ...io.blocks import BLOCK
from ...io.buffers import memory_of
from ...io.journal import Record

Range = tuple[Path, int, int]  # a file, an offset and a size in bytes


@dataclass(frozen=True)
class StartRecord:
    """A start without its factors: the start of the layer `name`, or of one expert of that
    parameter.

    `kept`: whether it is subtracted from the base and cannot be recomputed from `beta`. `has_R`:
    whether an R is trained. `offset`: where its factors begin in their file.
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
    trains: str = "AB"
    offset: int = 0
    expert: int | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes of the factors, in the order in which the file stores them."""
        rows, cols = self.shape
        shapes = {"lora_A": (self.r, cols), "lora_B": (rows, self.r)}
        if self.has_R:
            shapes["lora_R"] = (self.r, self.r)
        if self.kept and self.residual == "implicit":
            shapes |= {"start_A": shapes["lora_A"], "start_B": shapes["lora_B"]}
        return shapes

    def ranges(self, path: Path) -> Iterator[Range]:
        """The ranges of the factors in the file `path`."""
        itemsize, offset = DTYPES[self.dtype].itemsize, self.offset
        for a, b in self.shapes.values():
            yield path, offset, itemsize * a * b
            offset += itemsize * a * b

    def state(self, path: Path | None = None) -> LayerState:
        """The layer with its factors from the file `path`. Without a path, the factors are on the
        meta device: only shapes and dtypes.
        """
        dtype = DTYPES[self.dtype]
        if path is None:
            factors = {
                name: torch.empty(shape, dtype=dtype, device="meta")
                for name, shape in self.shapes.items()
            }
        else:
            contents = (bytearray(b"".join(_chunks(*part))) for part in self.ranges(path))
            factors = {
                name: torch.frombuffer(content, dtype=dtype).view(shape)
                for (name, shape), content in zip(self.shapes.items(), contents, strict=True)
            }
        if self.kept:  # in an adapter of the residual base, A and B are also the initial factors
            factors = {"start_A": factors["lora_A"], "start_B": factors["lora_B"]} | factors
        return LayerState(
            lora_A=factors["lora_A"],
            lora_B=factors["lora_B"],
            lora_R=factors.get("lora_R"),
            start_A=factors.get("start_A"),
            start_B=factors.get("start_B"),
            scaling=self.scaling,
            lora_alpha=self.lora_alpha,
            beta=self.beta,
            residual=self.residual,
            weight_norm=self.weight_norm,
            trains=self.trains,
        )


class FactorFile:
    """The factors of one shard's layers, in the order in which they were made."""

    def __init__(self, path: Path) -> None:
        self._records: list[StartRecord] = []
        self._lock = threading.Lock()
        self._file: BinaryIO = path.open("wb")

    def append(self, record: StartRecord, start: Start) -> None:
        """Writes the factors of a layer: those named in `record.shapes`."""
        factors = {"lora_A": start.lora_A, "lora_B": start.lora_B}
        factors |= zip(("start_A", "start_B"), start.subtracted(), strict=True)
        if start.lora_R is not None:
            factors["lora_R"] = start.lora_R
        with self._lock:
            self._records.append(replace(record, offset=self._file.tell()))
            for name in record.shapes:
                self._file.write(memory_of(factors[name]))

    def close(self) -> Record:
        """Closes the file and returns the record for the journal."""
        self._file.close()
        return {"starts": [asdict(record) for record in self._records]}


def read_records(record: Record) -> list[StartRecord]:
    """The starts that the journal's record of a shard lists."""
    return [StartRecord(**r | {"shape": tuple(r["shape"])}) for r in record["starts"]]


def stacked(states: Sequence[LayerState]) -> LayerState:
    """The state of an experts' parameter, from the states of its experts."""

    def stack(name: str) -> Tensor | None:
        found = [factor for state in states if (factor := getattr(state, name)) is not None]
        return torch.stack(found) if found else None

    def numbers(values: Sequence[float | Tensor | None]) -> Tensor | None:
        found = [float(value) for value in values if value is not None]
        return torch.tensor(found, dtype=torch.float64) if found else None

    lora_A, lora_B = stack("lora_A"), stack("lora_B")
    assert lora_A is not None and lora_B is not None
    return replace(
        states[0],
        lora_A=lora_A,
        lora_B=lora_B,
        lora_R=stack("lora_R"),
        start_A=stack("start_A"),
        start_B=stack("start_B"),
        beta=numbers([state.beta for state in states]),
        weight_norm=numbers([state.weight_norm for state in states]),
    )


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    contents: Iterable[Range | Tensor],
    metadata: dict[str, str],
) -> None:
    """Writes a safetensors file. The tensors may be on the meta device: `contents` has, for each
    tensor, the range of a file to copy, or a tensor of the same shape.
    """
    entries, position = [], 0
    for name, tensor in tensors.items():
        shape, dtype = tuple(tensor.shape), dtype_name(tensor.dtype)
        entries.append(Entry(name, dtype, shape, position, position + tensor.nbytes))
        position += tensor.nbytes
    layout = render(entries, metadata)
    with path.open("wb") as file:
        file.write(layout.head())
        for content in contents:
            if isinstance(content, Tensor):
                file.write(memory_of(content.detach().cpu().contiguous()))
            else:
                for chunk in _chunks(*content):
                    file.write(chunk)
    if path.stat().st_size != layout.file_size:
        raise OSError(f"{path} has a wrong size: the files that it was copied from have changed")


def _chunks(path: Path, offset: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while size > 0 and (chunk := file.read(min(size, BLOCK))):
            size -= len(chunk)
            yield chunk
