"""Merges an adapter into a checkpoint without loading the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..._utils.checks import all_finite
from ..._utils.names import nearest
from ..._utils.progress import ByteCounter, uncounted
from ..._utils.safetensors import DTYPES, Entry
from ..._utils.version import __version__
from ...init.start import subtract_factors_
from ...layers.state import LayerState
from ...model.config import AdapterState
from ..adapter.folder import read_adapter
from ..io.journal import JournaledFolder, identity
from ..io.pipeline import Actions, Shard, rewrite
from .folder import ModelFolder, check_apart, check_outside, check_space
from .residual import refuse_residual
from .weights import is_embedding, is_head, is_transposed


@dataclass(frozen=True)
class Change:
    """The change of a tensor of the base: s·B'A' is added, or another tensor replaces it."""

    entry: Entry
    file: Path
    transposed: bool = False
    layer: LayerState | None = None
    tensor: Tensor | None = None

    def apply_(self, weight: Tensor) -> None:
        """Changes the weight in place; raises a ValueError if the result is not finite."""
        if self.tensor is not None:
            weight.copy_(self.tensor)
        elif self.layer is not None:
            add_update_(weight.T if self.transposed else weight, self.layer)
        if not all_finite(weight):
            raise ValueError(f"the merged weight is not finite in {weight.dtype}")


@dataclass(frozen=True)
class MergeSummary:
    """The numbers of merged layers and replaced tensors, and the bytes read in this run."""

    layers: int
    replaced: int
    size: int


@torch.no_grad()
def add_update_(weight: Tensor, layer: LayerState) -> None:
    """W ← W + s(BA − B₀A₀) for a weight W [out, in] of the original base, with BRA for BA if there
    is an R; in float32 or wider, and rounded once.
    """
    right, left = (f.to(weight.device) for f in layer.update_factors())
    subtract_factors_(weight, right, left, -layer.scaling)


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    sync: bool = False,
    progress: ByteCounter = uncounted,
) -> MergeSummary:
    """Writes the model in `base` to `out`, with the adapter merged into it.

    The adapter may have any format; saved modules and biases replace those of the base. Everything
    else is as for `initialize`: what is copied, `dtype`, memory (apart from the adapter's), and
    continuing after a kill.

    Raises:
        ValueError: the adapter does not fit the base, was trained on another one, or is in `out`.
        FileNotFoundError: as `initialize`.
        OSError: as `initialize`.

    """
    check_apart(base, out)
    check_outside(adapter, out)
    folder = ModelFolder(base)
    state = read_adapter(adapter)
    refuse_residual(adapter, state, base)
    changes = changes_of(folder, state)
    by_file: dict[Path, set[str]] = {}
    for name, change in changes.items():
        by_file.setdefault(change.file, set()).add(name)
    task = {"command": "merge", "version": __version__, "dtype": str(dtype)}
    inputs = folder.identities() | {
        f"adapter {f.name}": identity(f) for f in sorted(adapter.iterdir()) if f.is_file()
    }

    def edit(shard: Shard, name: str, weight: Tensor) -> None:
        changes[name].apply_(weight)

    with JournaledFolder(out, task, inputs, overwrite, sync) as work:
        shards = folder.shards(by_file, work, dtype)
        remaining = work.remaining(shards)
        size = sum(shard.size for shard in remaining)
        check_space(out, sum(shard.target_layout.file_size for shard in remaining))
        actions = Actions(edit, lambda shard: work.finish(shard.name, {}), progress(size))
        rewrite(remaining, actions)
        if not work.completed:
            folder.copy_others(work)
            folder.publish(work, shards)
        work.complete()
    return MergeSummary(len(state.layers), len(state.extra), size)


def changes_of(folder: ModelFolder, state: AdapterState) -> dict[str, Change]:
    """The adapter's change of each tensor, by its name in the files.

    Raises:
        ValueError: a layer or a tensor is not in the base, or has another shape there.

    """
    stored = {
        entry.name: (file, entry)
        for file, layout in folder.layouts.items()
        for entry in layout.entries
    }
    wanted: Mapping[str, LayerState | Tensor] = {
        **{f"{name}.weight": layer for name, layer in state.layers.items()},
        **state.extra,
    }
    _check_tied(folder, wanted)
    changes: dict[str, Change] = {}
    for name, value in wanted.items():
        if name not in folder.tensors:
            raise ValueError(
                f"the adapter has {name!r}, which {folder.path} does not have"
                f"{nearest(name, folder.tensors)}"
            )
        file, entry = stored[folder.tensors[name]]
        layer = name.removesuffix(".weight")
        transposed = is_transposed(folder.config, layer)
        if isinstance(value, LayerState):
            shape: tuple[int, ...] = (value.lora_B.shape[0], value.lora_A.shape[1])
            expected = entry.shape[::-1] if transposed else entry.shape
            change = Change(entry, file, transposed, layer=value)
        else:
            shape, expected = tuple(value.shape), entry.shape
            change = Change(entry, file, tensor=value)
        if shape != tuple(expected):
            raise ValueError(
                f"{name!r} of the adapter is {list(shape)}, of {folder.path} {list(expected)}"
            )
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{name!r} is stored as {entry.dtype} in {folder.path}: use a base that is not "
                "quantised"
            )
        changes[entry.name] = change
    return changes


def _check_tied(folder: ModelFolder, wanted: Mapping[str, LayerState | Tensor]) -> None:
    """Raises if the adapter changes an input embedding or output head that the model ties."""
    if not folder.tied:
        return
    for name in wanted:
        layer = name.rpartition(".")[0]
        if is_embedding(layer) or is_head(layer):
            raise ValueError(
                f"the adapter changes {layer!r}, which {folder.path} ties to its output head or "
                "embedding: a merged model cannot store both; use the adapter unmerged"
            )
