"""A checkpoint with an adapter merged into it, without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..._utils.names import nearest
from ..._utils.progress import ByteCounter, uncounted
from ..._utils.version import __version__
from ...init.start import subtract_factors_
from ...layers.state import LayerState
from ...model.config import AdapterState
from ..adapter.folder import read_adapter
from ..io.journal import UnfinishedFolder, identity
from ..io.layout import DTYPES, Entry
from ..io.pipeline import Actions, Shard, run
from .folder import CONFIG, ModelFolder, check_apart, check_outside, check_space
from .residual import refuse_residual
from .weights import is_embedding, is_head, is_transposed


@dataclass(frozen=True)
class Change:
    """What happens to a tensor of the base: s·B'A' is added, or another takes its place."""

    entry: Entry
    file: Path
    transposed: bool = False
    layer: LayerState | None = None
    tensor: Tensor | None = None

    def apply_(self, weight: Tensor) -> None:
        """In place; ValueError if the sum is not finite."""
        if self.tensor is not None:
            weight.copy_(self.tensor)
        else:
            add_update_(weight.T if self.transposed else weight, self.layer)
        if weight.numel() and not bool(torch.linalg.vector_norm(weight, torch.inf).isfinite()):
            raise ValueError(f"the merged weight is not finite in {weight.dtype}")


@dataclass(frozen=True)
class MergeSummary:
    """How many layers were merged and tensors replaced, and the bytes read and written."""

    layers: int
    replaced: int
    size: int


@torch.no_grad()
def add_update_(weight: Tensor, layer: LayerState) -> None:
    """W ← W + s(BA − B₀A₀) of the original base W [out, in], with BRA for BA if there is an R; in
    float32 or wider, and rounded once.
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
    """Makes `out` the model of the folder `base` with the adapter of the folder `adapter`, of any
    format, merged into it; modules that were trained in full, and biases, replace those of the
    base.

    All else is as with `initialise`: layout, `dtype`, memory (beside the adapter's), going on
    after a kill.

    Raises:
        ValueError: the adapter does not fit the base, was trained on another one, or lies in `out`.
        FileNotFoundError, OSError: as there.

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
    inputs = {file.name: identity(file) for file in folder.layouts}
    inputs |= {str(name): identity(base / name) for name in (CONFIG, *folder.others)}
    inputs |= {f"adapter {f.name}": identity(f) for f in sorted(adapter.iterdir()) if f.is_file()}

    def edit(shard: Shard, name: str, weight: Tensor) -> None:
        changes[name].apply_(weight)

    with UnfinishedFolder(out, task, inputs, overwrite, sync) as work:
        shards = folder.shards(by_file, work, dtype)
        left = work.left(shards)
        size = sum(shard.size for shard in left)
        check_space(out, sum(shard.target_layout.file_size for shard in left))
        try:
            run(left, Actions(edit, lambda shard: work.finish(shard.name, {}), progress(size)))
        except (ValueError, TypeError):
            work.abandon()
            raise
        if not work.completed:
            folder.copy_others(work)
            folder.publish(work, shards)
        work.complete()
    return MergeSummary(len(state.layers), len(state.extra), size)


def changes_of(folder: ModelFolder, state: AdapterState) -> dict[str, Change]:
    """What the adapter does to each tensor of the files, by its name there.

    Raises:
        ValueError: a layer or a tensor is not in the base, or of another shape there.

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
                f"the adapter has {name!r}, which {folder.path} has not"
                f"{nearest(name, folder.tensors)}"
            )
        file, entry = stored[folder.tensors[name]]
        layer = name.removesuffix(".weight")
        transposed = is_transposed(folder.config, layer)
        if isinstance(value, LayerState):
            shape = (value.lora_B.shape[0], value.lora_A.shape[1])
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
                f"{name!r} is stored as {entry.dtype} in {folder.path}: take a base that is not "
                "quantised"
            )
        changes[entry.name] = change
    return changes


def _check_tied(folder: ModelFolder, wanted: Mapping[str, LayerState | Tensor]) -> None:
    """Raises if an input embedding or an output head changes that the model ties to each other."""
    if not folder.tied:
        return
    for name in wanted:
        layer = name.rpartition(".")[0]
        if is_embedding(layer) or is_head(layer):
            raise ValueError(
                f"the adapter changes {layer!r}, which {folder.path} ties to its output head or "
                "embedding: a merged model cannot tell them apart; use the adapter unmerged"
            )
