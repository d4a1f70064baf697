"""What an adapter changes in the files of its base: which tensors, and how."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..._utils.checks import all_finite
from ..._utils.names import nearest
from ..._utils.safetensors import DTYPES, Entry, load_tensor
from ...init.start import subtract_factors_
from ...layers.linear import rounded_sum
from ...layers.linear.attention import IN_PROJ
from ...layers.state import LayerState
from ...model.config import AdapterState, TokenRows
from ...model.experts.stored import StoredMatrix
from ...model.selection import input_embeddings, output_head
from ..adapter.peft_format.experts.placing import placed
from ..adapter.peft_format.shapes import attention_of
from .architecture import Architecture, classes_for
from .experts import stored_stack
from .folder import ModelFolder
from .weights import is_embedding, is_head


@dataclass(frozen=True)
class Added:
    """s·b, where b is a bias of B; it is added to a bias of the base."""

    tensor: Tensor


Value = LayerState | TokenRows | Added | Tensor
Wanted = Mapping[str, Value]  # by a tensor's name in the model


@dataclass(frozen=True)
class Change:
    """The change of a tensor of the base, whose name in the model is `name`."""

    name: str
    entry: Entry
    file: Path
    transposed: bool
    value: Value

    def apply_(self, weight: Tensor, index: int | None = None) -> None:
        """Changes the weight in place; raises a ValueError if the result is not finite."""
        _apply_(weight, self.value, self.transposed)
        _check_finite(weight)


@dataclass(frozen=True)
class ExpertChange:
    """The change of a tensor of the base that holds experts, or of some of its rows. `layer` is the
    adapter of the experts' parameter.
    """

    place: StoredMatrix
    file: Path
    layer: LayerState

    @torch.no_grad()
    def apply_(self, weight: Tensor, index: int | None = None) -> None:
        """Changes the tensor, or its slice `index`, in place; raises as `Change.apply_` does."""
        expert = index if self.place.expert is None else self.place.expert
        assert expert is not None
        layer = self.layer.expert(expert)
        right, left = (f.to(weight.device) for f in layer.update_factors())
        left = left[self.place.rows]
        if self.place.transposed:  # computed in the order of memory, which is 5 times as fast
            right, left = left.mT, right.mT
        subtract_factors_(weight, right, left, -layer.scaling)
        _check_finite(weight)


def _check_finite(weight: Tensor) -> None:
    if not all_finite(weight):
        raise ValueError(f"the merged weight is not finite in {weight.dtype}")


def _apply_(weight: Tensor, value: Value, transposed: bool) -> None:
    """Merges a layer's adapter or a bias into a tensor of the base, or replaces the tensor or some
    of its rows.
    """
    if isinstance(value, LayerState):
        value.add_to_(value.matrix_of(weight, transposed))
    elif isinstance(value, TokenRows):
        value.put_(weight)
    elif isinstance(value, Added):
        weight.copy_(rounded_sum(weight, value.tensor))
    else:
        weight.copy_(value)


@dataclass
class Changes:
    """What an adapter changes in the files of its base.

    Attributes:
        edits: the changed tensors, by their names in the files.
        sliced: the names of the tensors that are changed slice by slice.
        added: {name in the files: tensor} of tensors that the files lack or have in another shape.
        dropped: the names of the tensors that the files have in another shape.
        options: new values in `config.json`.
        vocab_size: the size of the vocabulary if it differs from the base's.

    """

    edits: dict[str, Change | ExpertChange] = field(default_factory=dict)
    sliced: set[str] = field(default_factory=set)
    added: dict[str, Tensor] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    options: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None


def placed_in(folder: ModelFolder, state: AdapterState) -> AdapterState:
    """The adapter with experts as parameters where the model has them so, as far as the model is
    known.

    Raises:
        ValueError: see `placed`.

    """
    architecture = folder.architecture
    return state if architecture is None else placed(state, architecture.model)


def folder_for(folder: ModelFolder, state: AdapterState) -> ModelFolder:
    """The folder, read as the class that has all of the adapter's layers and tensors: the class in
    `config.json`, or else one for the adapter's task or another task. So an adapter of a classifier
    may belong to a base that has no head.
    """
    wanted = _wanted(state)
    if folder.architecture is None or _has_all(folder, wanted):
        return folder
    for kind in classes_for(folder.path, state.config.task_type):
        other = ModelFolder(folder.path, kind)
        if other.architecture is not None and _has_all(other, wanted):
            labels = _labels(other.architecture, wanted)
            return other if labels is None else ModelFolder(folder.path, kind, labels)
    return folder


def weight_of(layer: str, layers: Collection[str]) -> str:
    """The name of an adapted layer's weight; an attention's is that of queries, keys, values."""
    attention = any(attention_of(other, layers) == layer for other in layers)
    return f"{layer}.{IN_PROJ if attention else 'weight'}"


def _wanted(state: AdapterState) -> Wanted:
    wanted: dict[str, Value] = {
        name if layer.experts else weight_of(name, state.layers): layer
        for name, layer in state.layers.items()
    }
    wanted |= {**state.extra, **state.rows, **_updated_weights(state)}
    for layer_name, layer in state.layers.items():
        bias = layer.portable_bias()
        if bias is not None:
            name = weight_of(layer_name, state.layers).removesuffix("weight") + "bias"
            trained = state.extra.get(name)
            wanted[name] = Added(bias) if trained is None else rounded_sum(trained, bias)
    return wanted


@torch.no_grad()
def _updated_weights(state: AdapterState) -> dict[str, Tensor]:
    """The updated weights of the layers whose base weight is in the adapter's files too, as PEFT
    stores adapted embeddings and heads.
    """
    found = {}
    for name, layer in state.layers.items():
        if f"{name}.weight" in state.extra:
            weight = state.extra[f"{name}.weight"]
            work = torch.promote_types(weight.dtype, torch.float32)
            found[f"{name}.weight"] = weight.to(work, copy=True)
            _apply_(found[f"{name}.weight"], layer, False)
    return found


def _has_all(folder: ModelFolder, wanted: Wanted) -> bool:
    known = {} if folder.architecture is None else folder.architecture.model.state_dict()
    return all(name in folder.tensors or name in known for name in wanted)


def _labels(architecture: Architecture, wanted: Wanted) -> int | None:
    """The number of labels of the adapter's head, if the model's head has another number."""
    known = architecture.model.state_dict()
    for name, value in wanted.items():
        if not isinstance(value, Tensor) or name in architecture.stored or not value.dim():
            continue
        if value.shape[1:] == known[name].shape[1:] and len(value) != len(known[name]):
            return len(value)
    return None


def changes_of(folder: ModelFolder, state: AdapterState) -> Changes:
    """How the adapter changes the files.

    Raises:
        ValueError: a layer or a tensor is not in the base, has another shape there, or the files do
            not store it as the model has it.

    """
    changes = Changes()
    architecture = folder.architecture
    wanted = dict(_wanted(state))
    for name in (f"{layer}.weight" for layer in state.layers):
        if architecture is not None and name in state.extra:  # tied modules get the same value
            wanted = dict.fromkeys(architecture.tied(name), state.extra[name]) | wanted
    if architecture is None:
        _check_tied(folder, wanted)
    else:
        changes.options = _options(folder)
        changes.vocab_size = resized_to(architecture, state)
        if changes.vocab_size is not None:
            _set_option(folder, changes, "vocab_size", changes.vocab_size, top=False)
    done: set[str] = set()
    for name, value in wanted.items():
        tied = [] if architecture is None else architecture.tied(name)
        if name in done:
            continue
        if architecture is not None and tied:
            done |= {name, *tied}
            _change_tied(folder, architecture, changes, wanted, [name, *tied])
        else:
            _change(folder, changes, name, value)
    if changes.vocab_size is not None:
        _resize_others(folder, changes)
    return changes


def _resize_others(folder: ModelFolder, changes: Changes) -> None:
    """Resizes the other tensors that depend on the size of the vocabulary, such as the bias of the
    output head. New entries are zero, as in `resize_token_embeddings`.
    """
    resized = replace(folder, vocab_size=changes.vocab_size).architecture
    known = {} if resized is None else resized.model.state_dict()
    for name, stored in () if resized is None else resized.stored.items():
        file, entry = folder.entries[stored]
        shape = tuple(known[name].shape)
        if stored in changes.dropped or shape == entry.shape:
            continue
        if math.prod(shape) != max(shape):
            raise ValueError(
                f"the adapter has the embeddings of {changes.vocab_size} tokens, but no {name!r} "
                f"{list(shape)}: merge it into a base that was resized"
            )
        old, new = load_tensor(file, stored), torch.zeros(shape, dtype=DTYPES[entry.dtype])
        kept = tuple(
            slice(0, min(size, before)) for size, before in zip(shape, old.shape, strict=True)
        )
        new[kept] = old[kept]
        changes.dropped.add(stored)
        changes.added[stored] = new


def _change(folder: ModelFolder, changes: Changes, name: str, value: Value) -> None:
    """Adds the change of one tensor."""
    if isinstance(value, LayerState) and value.experts:
        _change_experts(folder, changes, name, value)
        return
    stored = folder.tensors.get(name)
    if stored is None:
        if isinstance(value, Added):
            raise ValueError(
                f"the adapter has a bias of lora_B, and {folder.path} has no {name!r} to merge it "
                "into: use the adapter unmerged, or load_adapter and merge_lora"
            )
        if not isinstance(value, Tensor) or not _has_all(folder, {name: value}):
            raise ValueError(_why_not_stored(folder, name))
        changes.added[name] = value
        return
    file, entry = folder.entries[stored]
    transposed = folder.is_transposed(name.removesuffix(".weight"))
    expected = tuple(entry.shape)
    if isinstance(value, LayerState):
        shape: tuple[int, ...] = value.stored_shape(transposed)
        if not value.kernel and (transposed or value.embedding):  # the shape as [out, in]
            shape, expected = shape[::-1], expected[::-1]
    elif isinstance(value, TokenRows):
        value.check(name, entry.shape)
        shape = expected
    else:
        shape = tuple(value.tensor.shape if isinstance(value, Added) else value.shape)
    whole = value if isinstance(value, Tensor) else None
    resized = whole is not None and is_resized(changes.vocab_size, shape, entry.shape)
    if shape != expected and not resized:
        raise ValueError(
            f"{name!r} of the adapter is {list(shape)}, of {folder.path} {list(expected)}"
        )
    integers = whole is not None and not whole.is_floating_point()
    if entry.dtype not in DTYPES and not integers:
        raise ValueError(
            f"{name!r} is stored as {entry.dtype} in {folder.path}: use a base that is not "
            "quantized"
        )
    if whole is not None and (resized or integers):
        changes.dropped.add(stored)
        changes.added[stored] = whole
    else:
        changes.edits[stored] = Change(name, entry, file, transposed, value)


def _change_experts(folder: ModelFolder, changes: Changes, name: str, layer: LayerState) -> None:
    """Adds the changes of the tensors that hold an experts' parameter."""
    architecture = check_experts(folder, name, layer)
    experts = layer.experts or 0
    found = stored_stack(architecture, folder.entries, name, experts, layer.shape)
    if isinstance(found, str):
        raise ValueError(f"the adapter has {name!r} of {folder.path}, but {found}")
    for tensor, place in found.parts:
        changes.edits[tensor.name] = ExpertChange(place, tensor.file, layer)
        if place.expert is None:
            changes.sliced.add(tensor.name)


def check_experts(folder: ModelFolder, name: str, layer: LayerState) -> Architecture:
    """Raises ValueError unless the base has the experts' parameter `name` with the adapter's shape;
    returns the base's architecture.
    """
    architecture = folder.architecture
    if architecture is None:
        raise ValueError(
            f"the adapter has the experts {name!r}, which needs a model that transformers knows: "
            f"{folder.assumption}"
        )
    parameter = architecture.parameters.get(name)
    if parameter is None or parameter.dim() != 3:
        near = nearest(name, architecture.parameters)
        raise ValueError(f"the adapter has {name!r}, which {folder.path} does not have{near}")
    experts, rows, cols = parameter.shape
    module = architecture.modules[name.rpartition(".")[0]]
    rows, cols = (cols, rows) if getattr(module, "is_transposed", False) else (rows, cols)
    if (experts, rows, cols) != (layer.experts, *layer.shape):
        raise ValueError(
            f"{name!r} of the adapter is {[layer.experts, *layer.shape]}, of {folder.path} "
            f"{[experts, rows, cols]}"
        )
    return architecture


def _why_not_stored(folder: ModelFolder, name: str) -> str:
    if folder.architecture is not None and name in folder.architecture.converted:
        return (
            f"{name!r} is computed from other tensors of {folder.path} by loading: load the model "
            "and the adapter, and use merge_lora and save_pretrained"
        )
    near = nearest(name, folder.tensors)
    return f"the adapter has {name!r}, which {folder.path} does not have{near}"


def _options(folder: ModelFolder) -> dict[str, Any]:
    """New values of `config.json` for the class and its labels, if they differ from the base's."""
    options: dict[str, Any] = {"architectures": [folder.kind]} if folder.kind else {}
    if folder.num_labels is not None:
        labels = [f"LABEL_{k}" for k in range(folder.num_labels)]
        options["id2label"] = {str(k): label for k, label in enumerate(labels)}
        options["label2id"] = {label: k for k, label in enumerate(labels)}
    return options


def resized_to(architecture: Architecture, state: AdapterState) -> int | None:
    """The size of the vocabulary in the adapter's embedding, if it differs from the base's."""
    name = _embedding_name(architecture)
    value = state.extra.get(name)
    resized = value is not None and len(value) != len(architecture.parameters[name])
    return len(value) if value is not None and resized else None


def _embedding_name(architecture: Architecture) -> str:
    """The name of the input embedding's weight; ".weight" if there is none."""
    return _weight_of(architecture, input_embeddings(architecture.model))


def _weight_of(architecture: Architecture, wanted: nn.Module | None) -> str:
    names = (name for name, module in architecture.modules.items() if module is wanted)
    return f"{next(names, '')}.weight"


def _set_option(folder: ModelFolder, changes: Changes, key: str, value: Any, top: bool) -> None:
    """Sets a value of `config.json`. If the text model has a configuration of its own, the value is
    set there, and in the whole model's configuration only if this has the key or `top` is True.
    """
    config = {**folder.config, **changes.options}
    text = config.get("text_config")
    if isinstance(text, dict):
        changes.options["text_config"] = text | {key: value}
    if top or key in config or not isinstance(text, dict):
        changes.options[key] = value


def is_resized(vocab_size: int | None, shape: Sequence[int], before: Sequence[int]) -> bool:
    """Whether the shapes differ only by the size of the vocabulary, which is `vocab_size` now."""
    different = [size for size, old in zip(shape, before, strict=False) if size != old]
    return len(shape) == len(before) and different == [vocab_size]


def _change_tied(
    folder: ModelFolder,
    architecture: Architecture,
    changes: Changes,
    wanted: Wanted,
    names: Sequence[str],
) -> None:
    """Adds the changes of a tensor that several modules share. If the modules then need different
    values, the output head gets a tensor of its own, as in `merge_lora`.
    """
    stored = [name for name in names if name in folder.tensors]
    if not stored:
        raise ValueError(_why_not_stored(folder, names[0]))
    file, entry = folder.entries[folder.tensors[stored[0]]]
    base = load_tensor(file, entry.name)
    embedding = wanted.get(_embedding_name(architecture))
    # After resizing, all have the new size; otherwise a module that is not trained does not change.
    resized = changes.vocab_size is not None and isinstance(embedding, Tensor)
    default = embedding if resized and isinstance(embedding, Tensor) else base
    if isinstance(embedding, TokenRows):  # tied modules get the rows too
        embedding.check(names[0], base.shape)
        default = embedding.put_(base.clone())
    values = {name: _merged(folder, name, base, wanted.get(name, default)) for name in names}
    first = values[names[0]]
    if not all(_equal(value, first) for value in values.values()):
        head = _weight_of(architecture, output_head(architecture.model))
        others = [value for name, value in values.items() if name != head]
        if head not in names or not all(_equal(value, others[0]) for value in others):
            raise ValueError(
                f"the adapter changes {names[0]!r}, which {folder.path} shares with {names[1]!r}: "
                "a merged model cannot store both; use the adapter unmerged"
            )
        _set_option(folder, changes, "tie_word_embeddings", False, top=True)
        for name in names:
            if name not in stored:
                changes.added[name] = values[name]
    for name in stored:
        if not _equal(values[name], base):
            _change(folder, changes, name, values[name])


@torch.no_grad()
def _merged(folder: ModelFolder, name: str, base: Tensor, value: Value) -> Tensor:
    """A tensor of the base with its change applied, in the tensor's dtype."""
    if isinstance(value, Tensor):
        return value.to(base.dtype)
    if isinstance(value, TokenRows):
        value.check(name, base.shape)
    merged = base.clone()
    _apply_(merged, value, folder.is_transposed(name.removesuffix(".weight")))
    return merged


def _equal(one: Tensor, other: Tensor) -> bool:
    return one is other or torch.equal(one, other)


def _check_tied(folder: ModelFolder, wanted: Wanted) -> None:
    """Raises ValueError if the adapter changes an input embedding or output head that the model
    ties; both are recognized by their names.
    """
    if not folder.tied:
        return
    for name in wanted:
        layer = name.rpartition(".")[0]
        if is_embedding(layer) or is_head(layer):
            raise ValueError(
                f"the adapter changes {layer!r}, which {folder.path} ties to its output head or "
                "embedding: a merged model cannot store both; use the adapter unmerged"
            )
