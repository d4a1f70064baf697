"""Merges an adapter into a checkpoint without loading the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..._utils.checks import all_finite
from ..._utils.progress import ByteCounter, uncounted
from ..._utils.safetensors import DTYPES
from ..._utils.version import __version__
from ..adapter.folder import read_adapter
from ..io.blocks import Piece
from ..io.journal import ALONE, JournaledFolder, Ranks, identity
from ..io.pipeline import Actions, Shard, rewrite
from .changes import changes_of, folder_for, placed_in
from .folder import ModelFolder, check_apart, check_outside
from .residual import refuse_residual


@dataclass(frozen=True)
class MergeSummary:
    """The numbers of merged layers and replaced tensors, and the bytes that all ranks read in this
    run. `assumption` says what was assumed about a model that transformers does not know; else it
    is empty.
    """

    layers: int
    replaced: int
    size: int
    assumption: str = ""


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    sync: bool = False,
    progress: ByteCounter = uncounted,
    ranks: Ranks = ALONE,
) -> MergeSummary:
    """Writes the model in `base` to `out`, with the adapter merged into it.

    The adapter may have any format. Its saved modules and biases replace those of the base. They
    are added if the base lacks them: the head of a classifier, whose class is then the one in
    `config.json`, the embeddings of a resized vocabulary, or a head that differs from the embedding
    that the base ties it to. For everything else see `initialize`: what is copied, `dtype`, memory
    (in addition to the adapter's), continuing after a kill, and several `ranks`, each of which
    reads the adapter.

    Raises:
        ValueError: the adapter does not fit the base, was trained on another one, or is in `out`.
        FileNotFoundError: see `initialize`.
        OSError: see `initialize`.

    """
    check_apart(base, out)
    check_outside(adapter, out)
    state = read_adapter(adapter)
    if state.replication:
        raise ValueError(
            f"{adapter} repeats blocks of the model (layer_replication = "
            f"{list(map(list, state.replication))}), and the files of {base} hold each of them "
            "once: load the model and the adapter, and use merge_lora and save_pretrained"
        )
    folder = ModelFolder(base)
    state = placed_in(folder, state)
    folder = folder_for(folder, state)
    refuse_residual(adapter, state, base)
    changes = changes_of(folder, state)
    edits = changes.edits
    added = {name: _cast(folder, tensor, dtype) for name, tensor in changes.added.items()}
    by_file: dict[Path, set[str]] = {}
    for name, change in edits.items():
        by_file.setdefault(change.file, set()).add(name)
    task = {"command": "merge", "version": __version__, "dtype": str(dtype)}
    inputs = folder.identities() | {
        f"adapter {f.name}": identity(f) for f in sorted(adapter.iterdir()) if f.is_file()
    }

    def edit(shard: Shard, piece: Piece, weight: Tensor) -> None:
        edits[piece.name].apply_(weight, piece.index)

    with JournaledFolder(out, task, inputs, overwrite, sync, ranks) as work:
        shards = folder.shards(by_file, work, dtype, changes.dropped, added, changes.sliced)
        remaining = work.remaining(shards)
        own = work.share(remaining)
        advanced = work.watched(progress(sum(shard.size for shard in own)))
        rewrite(own, Actions(edit, lambda shard: work.finish(shard.name, {}), advanced))
        if work.gathered() and not work.completed:
            folder.copy_others(work)
            folder.publish(work, shards, changes.options)
        work.complete()
    size = sum(shard.size for shard in remaining)
    replaced = len(state.extra) + len(state.rows)
    return MergeSummary(len(state.layers), replaced, size, folder.assumption)


def _cast(folder: ModelFolder, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor to add to the files, in `dtype` or in the most frequent dtype of the files."""
    if not tensor.is_floating_point():
        return tensor
    kinds = Counter(e.dtype for _, e in folder.entries.values() if e.dtype in DTYPES)
    usual = DTYPES[kinds.most_common(1)[0][0]] if kinds else tensor.dtype
    cast = tensor.to(dtype or usual)
    if not all_finite(cast):
        raise ValueError(f"a tensor of the adapter exceeds the range of {cast.dtype}")
    return cast
