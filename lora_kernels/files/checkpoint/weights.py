"""Loads the weights of linear layers from safetensors files one at a time. `chosen_weights` chooses
them by the model's architecture, `stored_weights` by their names alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._utils.model_files import StoredTensor, read_json, stored_tensors
from ..._utils.names import ALL_LINEAR, match_names
from ..._utils.peft_names import ADAPTER_CONFIG
from ..._utils.safetensors import DTYPES
from ...layers.base import BaseLayer
from ...layers.kinds import ATTENTION, CONVOLUTION, EMBEDDING, OUT_PROJECTION
from ...model.config import LoRAConfig
from ...model.selection import select_layers as select_modules
from ..adapter.peft_format.loading import differing_in_peft, lost_in_peft
from .architecture import Architecture
from .experts import Entries, Matrix, Part, StoredStack, stored_stack

# Models with Conv1D layers, whose weights are stored [in, out], and the names of these layers.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
# Last parts of the names of 2-D weights that are not projections: output heads and embeddings.
_HEAD = re.compile(r"lm_head|embed_out")
_EMBEDDING = re.compile(r"wte|wpe|shared|relative_attention_bias|(?!embed_out).*embed.*")


@dataclass(frozen=True)
class StoredWeight:
    """The weight of a linear layer or convolution; `name` is the layer's name in the model."""

    name: str
    tensor: StoredTensor
    transposed: bool

    @property
    def kernel(self) -> tuple[int, ...]:
        """The sizes of a convolution's kernel; () for a linear layer."""
        return tuple(self.tensor.entry.shape[2:])

    def load(self) -> Tensor:
        """W [out, in], on the CPU."""
        weight = self.tensor.load().flatten(1)
        return weight.T if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, *rest = self.tensor.entry.shape
        cols = math.prod(rest)
        return (cols, rows) if self.transposed else (rows, cols)

    def matrices(self) -> Iterator[Matrix]:
        """W as the only matrix."""
        rows = slice(0, self.shape[0])
        part = Part(self.tensor, None, rows, self.transposed)
        yield Matrix(self.name, None, self.shape, (part,))


def chosen_weights(
    architecture: Architecture,
    path: Path,
    entries: Entries,
    config: LoRAConfig,
    absorb: bool,
) -> tuple[list[StoredWeight | StoredStack], dict[str, str]]:
    """The weights of the layers that `add_lora` would adapt in the model, in the model's order; and
    the reason for each layer that is left out.

    `entries` are the tensors in the files of the folder `path`, by their names there. `absorb`: a
    start will be subtracted from the weights, and PEFT adds it back. The weights must then not be
    tied to others, and PEFT must find each layer.

    Raises:
        ValueError: see `lora_kernels.model.selection.select_layers`; a layer is quantized in the
            files or has another shape there; or a layer that the user named cannot get a start.
            Experts are always named by the user.

    """
    selection = select_modules(architecture.model, config)
    weights: list[StoredWeight | StoredStack] = []
    skipped, quantized = dict(selection.skipped), []
    linear = [name for name, base in selection.layers.items() if base.num_experts is None]
    lost = lost_in_peft(architecture.model, linear) if absorb else {}
    for name, base in selection.layers.items():
        if base.num_experts is not None:
            found = stored_stack(architecture, entries, name, base.num_experts, base.shape)
            if isinstance(found, str):
                raise ValueError(f"target_parameters names {name!r} of {path}, but {found}")
            weights.append(found)
            continue
        if (reason := _why_not_here(base, absorb)) is not None:
            skipped[name] = f"it is {reason}: adapt it with add_lora"
            continue
        tied = architecture.tied(f"{name}.weight")
        stored = next((n for n in (f"{name}.weight", *tied) if n in architecture.stored), "")
        tensor = StoredTensor(*entries[architecture.stored[stored]]) if stored else None
        if _is_quantized(architecture, name, tensor):
            quantized.append(name)
        elif tensor is None:
            computed = f"{name}.weight" in architecture.converted
            what = "computed from other tensors by loading" if computed else "not in the files"
            skipped[name] = f"its weight is {what}"
        elif absorb and tied:
            skipped[name] = f"its weight is {tied[0]} too: use residual='implicit'"
        elif name in lost:
            skipped[name] = lost[name]
        else:
            weight = StoredWeight(name, tensor, base.transposed)
            _check_shape(weight, base.shape)
            weights.append(weight)
    if quantized:
        raise ValueError(
            f"{len(quantized)} of {len(linear)} chosen layers are quantized in the files "
            f"of {path} ({quantized[0]} ...), and a start needs floating-point weights: dequantize "
            "the model first, or choose other layers with target_modules or exclude_modules"
        )
    named = [name for name in skipped if name in selection.layers]
    if named and not is_all_linear(config.target_modules or ()):
        raise ValueError(f"target_modules names {named[0]!r}, but {skipped[named[0]]}")
    if not weights:
        reasons = "; ".join(dict.fromkeys(skipped.values()))
        raise ValueError(f"no layer of {path} is left to start: {reasons}")
    return weights, skipped


def _why_not_here(base: BaseLayer, absorb: bool) -> str | None:
    """Why a layer cannot get a start in files, as "it is ..."; None if it can."""
    if base.kind == EMBEDDING:
        return "an embedding"
    if base.kind in (ATTENTION, OUT_PROJECTION):
        return "an attention"
    if base.kind != CONVOLUTION:
        return None
    if base.geometry[1] > 1:
        return "a convolution with groups"
    differs = differing_in_peft({"": base.layer}, [""])
    if absorb and differs:  # because PEFT will train it
        return f"a convolution that PEFT computes in another way ({next(iter(differs))})"
    return None


def _is_quantized(architecture: Architecture, layer: str, tensor: StoredTensor | None) -> bool:
    """Whether the files have codes in place of the layer's floating-point weight."""
    if tensor is not None:
        return tensor.entry.dtype not in DTYPES
    return any(name.startswith(f"{layer}.") for name in architecture.unused)


def _check_shape(weight: StoredWeight, shape: tuple[int, int]) -> None:
    if weight.shape != shape:
        stored = weight.tensor.entry.shape
        raise ValueError(
            f"{weight.name} is {list(shape)} by config.json, its weight in the files "
            f"{list(stored)}: they do not belong together"
        )


def stored_weights(
    path: Path,
    targets: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] | None = None,
) -> list[StoredWeight]:
    """The projections of a checkpoint, in the order of `select_layers`.

    Candidates are the 2-D floating-point tensors called "<layer>.weight". "all-linear" excludes
    embeddings and output heads, which are recognized by name. A list of names or endings, or a
    regular expression, selects from all candidates. `exclude` has the same form.

    Raises:
        ValueError: nothing is selected, or the file holds an adapter; see also `stored_tensors`.

    """
    tensors = stored_tensors(path)
    if any(".lora_A." in tensor.name for tensor in tensors):
        raise ValueError(
            f"{path} holds a LoRA adapter: give the folder of its {ADAPTER_CONFIG}, which has the "
            "scaling"
        )
    matrices = {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in tensors
        if tensor.name.endswith(".weight")
        and len(tensor.entry.shape) == 2
        and tensor.entry.dtype in DTYPES
    }
    names = select_layers(matrices, targets)
    if is_all_linear(targets):
        names = [name for name in names if not is_embedding(name) and not is_head(name)]
    if names and exclude:
        excluded = set(match_names(names, exclude))
        names = [name for name in names if name not in excluded]
        if not names:
            raise ValueError(f"exclude leaves none of the layers of {path}")
    if not names:
        dtypes = ", ".join(sorted({tensor.entry.dtype for tensor in tensors}))
        raise ValueError(
            f"{path} has no 2-D weight of a linear layer in {', '.join(DTYPES)}; its tensors are "
            f"{dtypes or 'none at all'} (dequantize them first if they are quantized)"
        )
    file = path / "config.json" if path.is_dir() else path.parent / "config.json"
    config = read_json(file) if file.is_file() else {}
    return [StoredWeight(name, matrices[name], is_transposed(config, name)) for name in names]


def select_layers(names: Collection[str], targets: str | Sequence[str]) -> list[str]:
    """The names that `targets` selects, sorted with numbers as numbers: layer 2 before layer 10."""
    found = list(names) if is_all_linear(targets) else match_names(names, targets)
    return sorted(found, key=_numbers_as_numbers)


def is_all_linear(targets: str | Sequence[str]) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def is_transposed(config: Mapping[str, Any], layer: str) -> bool:
    """Whether the layer is a Conv1D, stored [in, out]; `config` is the content of `config.json`."""
    return config.get("model_type") in _CONV1D_MODELS and _ending(layer) in _CONV1D_LAYERS


def is_embedding(layer: str) -> bool:
    """Whether the layer's name is that of an embedding."""
    return _EMBEDDING.fullmatch(_ending(layer)) is not None


def is_head(layer: str) -> bool:
    """Whether the layer's name is that of an output head."""
    return _HEAD.fullmatch(_ending(layer)) is not None


def _ending(name: str) -> str:
    return name.rpartition(".")[2]


def _numbers_as_numbers(name: str) -> list[tuple[bool, int, str]]:
    parts = name.split(".")
    return [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts]
