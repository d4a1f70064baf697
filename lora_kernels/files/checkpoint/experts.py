"""The matrices of linear layers and experts, and the tensors, or slices of tensors, of a model's
files that hold their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..._utils.model_files import StoredTensor
from ..._utils.safetensors import DTYPES, Entry, load_entry
from ...model.experts.stored import StoredMatrix, stored_matrices
from .architecture import Architecture

Entries = Mapping[str, tuple[Path, Entry]]  # {name of a tensor: its file and entry}


@dataclass(frozen=True)
class Part:
    """Rows of a matrix W [out, in] that a tensor, or its slice `index`, holds."""

    tensor: StoredTensor
    index: int | None
    rows: slice
    transposed: bool

    @property
    def key(self) -> tuple[str, int | None]:
        """The tensor's name and the index."""
        return self.tensor.name, self.index

    def matrix(self, stored: Tensor) -> Tensor:
        """A view [rows, in] of the stored tensor; for a convolution [rows, in / groups · k ...]."""
        if stored.dim() > 2:
            return stored.view(len(stored), -1)
        return stored.mT if self.transposed else stored

    def load(self) -> Tensor:
        """The rows [rows, in], on the CPU."""
        entry = self.tensor.entry if self.index is None else self.tensor.entry.slice(self.index)
        return self.matrix(load_entry(self.tensor.file, entry))


@dataclass(frozen=True)
class Matrix:
    """W [out, in] of a linear layer, or of one expert of the parameter `layer`. `parts` are in the
    order of their rows.
    """

    layer: str
    expert: int | None
    shape: tuple[int, int]
    parts: tuple[Part, ...]

    @property
    def title(self) -> str:
        """The matrix's name in messages and for its seed."""
        return self.layer if self.expert is None else f"{self.layer}[{self.expert}]"


@dataclass(frozen=True)
class StoredStack:
    """The experts of a model's parameter `name`, W [E, out, in]."""

    name: str
    num_experts: int
    shape: tuple[int, int]
    parts: tuple[tuple[StoredTensor, StoredMatrix], ...]

    @property
    def stacked(self) -> bool:
        """Whether one tensor in the files holds all experts."""
        return self.parts[0][1].expert is None

    def matrices(self) -> Iterator[Matrix]:
        """The matrices of the experts."""
        for expert in range(self.num_experts):
            parts = (
                Part(tensor, expert if place.expert is None else None, place.rows, place.transposed)
                for tensor, place in self.parts
                if place.expert in (None, expert)
            )
            yield Matrix(self.name, expert, self.shape, tuple(parts))


def stored_stack(
    architecture: Architecture,
    entries: Entries,
    name: str,
    num_experts: int,
    shape: tuple[int, int],
) -> StoredStack | str:
    """Where the files hold the experts' parameter `name`, whose experts have the shape [out, in] =
    `shape`; or the reason why they cannot be edited.
    """
    found = _places(architecture, entries, name, num_experts, shape)
    if isinstance(found, str):
        return found
    tensors = [StoredTensor(*entries[place.name]) for place in found]
    for tensor in tensors:
        if tensor.entry.dtype not in DTYPES:
            return f"it is quantized in the files ({tensor.name!r} is {tensor.entry.dtype})"
    dtypes = sorted({tensor.entry.dtype for tensor in tensors})
    if len(dtypes) > 1:
        return f"the files hold parts of it in different dtypes ({', '.join(dtypes)})"
    return StoredStack(name, num_experts, shape, tuple(zip(tensors, found, strict=True)))


def _places(
    architecture: Architecture, entries: Entries, name: str, experts: int, shape: tuple[int, int]
) -> list[StoredMatrix] | str:
    """The parts, with their names and shapes in the files."""
    if name in architecture.stored:  # the tensor is loaded unchanged
        module = architecture.modules[name.rpartition(".")[0]]
        transposed = bool(getattr(module, "is_transposed", False))
        places = [StoredMatrix(architecture.stored[name], None, slice(0, shape[0]), transposed)]
        return _wrong_shape(places, entries, experts, shape[1]) or places
    if name not in architecture.converted:
        if any(other.startswith(name) for other in architecture.unused):
            return "it is quantized in the files"
        return "it is not in the files"
    reason = ""
    for other_shape in (False, True):
        saved = stored_matrices(architecture.model, name, loaded_as_other_shape=other_shape)
        found = saved if isinstance(saved, str) else _named(architecture, name, saved)
        if isinstance(found, str):
            return found
        wrong = _wrong_shape(found, entries, experts, shape[1])
        if not wrong:
            return found
        reason = reason or wrong
    return reason


def _named(
    architecture: Architecture, name: str, places: list[StoredMatrix]
) -> list[StoredMatrix] | str:
    """The places with the tensors' names in the files; or which tensor is missing."""
    names, sources = architecture.names, dict(architecture.sources[name])
    found = []
    for place in places:
        key = place.name if names is None else names.before_conversion(place.name)
        stored = sources.pop(key, None)
        if stored is None:
            return f"{place.name!r} is not in the files"
        found.append(replace(place, name=stored))
    if sources:
        return f"config.json does not have {next(iter(sources.values()))!r} of the files"
    return found


def _wrong_shape(
    places: list[StoredMatrix], entries: Entries, experts: int, columns: int
) -> str | None:
    """The first tensor whose shape in the files differs from the model's; None if there is none."""
    for place in places:
        expected, stored = place.shape(experts, columns), entries[place.name][1].shape
        if stored != expected:
            return (
                f"{place.name!r} is {list(expected)} by config.json, {list(stored)} in the files: "
                "they do not belong together"
            )
    return None
