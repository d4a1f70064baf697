"""What the files in an adapter's folder contain, in each format.

"peft": `adapter_config.json` and `adapter_model.safetensors`, which give the adapted model on the
original base, whatever the start and the loader (see `portable`). "start": the same two files, for
a base from which the start was subtracted. "native": `adapter_native.safetensors`, another name on
purpose, holds A, B, R and those initial factors that cannot be recomputed, at their own rank.

In all of them the recipe, from which training continues exactly, is in the header of the tensors,
which PEFT and serving engines do not read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._utils.checks import all_finite
from ..._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE, REPLICATION, factor_keys
from ..._utils.safetensors import save_tensors
from ...layers.state import LayerState
from ...model.config import AdapterState
from ..io.replace import replace_files
from .peft_format.experts.layouts import STACKED, Pair, from_pairs, to_pairs
from .peft_format.experts.writing import Parts, expert_layers, file_parts, layout_of
from .peft_format.writing import rank_fields, to_peft
from .portable import portable_recipe, within_header
from .recipe import (
    EXPERTS,
    METADATA,
    NATIVE,
    PEFT,
    START,
    TENSORS,
    experts_to_json,
    layer_to_dict,
    parts_to_json,
    recipe_to_json,
)
from .tensors import native_tensors

NATIVE_FILE = "adapter_native.safetensors"
NATIVE_TYPE = "LORA_KERNELS"  # its peft_type, which PEFT does not know
ADAPTER_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_FILE, NATIVE_FILE})


@dataclass(frozen=True)
class FolderContent:
    """`config` is the content of `adapter_config.json`; `tensors` and `recipe` are in `file`.
    `parts` are the tensors that hold experts, by the names of their layers.
    """

    file: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    recipe: str | None
    parts: Parts = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of `file`."""
        return {METADATA: self.recipe} if self.recipe else {}

    def write(self, folder: Path, owned: Collection[str] = ADAPTER_FILES) -> dict[str, int]:
        """Replaces the adapter in a folder, as `replace_files`; returns the sizes by name.

        Raises:
            ValueError: a tensor is not finite, because s·B was too large; nothing is written then.
            OSError: as `replace_files`.

        """
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise ValueError(
                    f"{name!r}, which has s multiplied in, exceeds the range of {tensor.dtype}; "
                    "nothing was written"
                )
        config = json.dumps(self.config, indent=2, allow_nan=False).encode()
        size = replace_files(
            folder,
            self.file,
            lambda path: save_tensors(self.tensors, path, self.metadata),
            {ADAPTER_CONFIG: config},
            owned,
        )
        return {self.file: size, ADAPTER_CONFIG: len(config)}


def factors_of(content: FolderContent, layers: Mapping[str, LayerState]) -> dict[str, Pair]:
    """A' and B' of these layers in the files of format "peft"; of experts, 3-D."""

    def pair(name: str) -> Pair:
        key_A, key_B = factor_keys(name, content.tensors)
        return content.tensors[key_A], content.tensors[key_B]

    found = {}
    for name, layer in layers.items():
        parts, experts = content.parts.get(name, ()), layer.experts or 1
        pairs = {own: pair(own) for part in parts for own in part.names(experts)}
        found[name] = from_pairs(pairs, parts, experts) if parts else pair(name)
    return found


def with_factors(content: FolderContent, factors: Mapping[str, Pair]) -> FolderContent:
    """The content with other A' and B' of the same shapes."""
    tensors = dict(content.tensors)
    for name, (right, left) in factors.items():
        parts = content.parts.get(name, ())
        pairs = to_pairs(right, left, parts) if parts else {name: (right, left)}
        for own, pair in pairs.items():
            tensors |= zip(factor_keys(own, content.tensors), pair, strict=True)
    return replace(content, tensors=tensors)


def folder_content(
    state: AdapterState,
    format: str,
    *,
    module_names: Collection[str] | None = None,
    fan_in_fan_out: bool = False,
    original: str | None = None,
    task_type: str | None = None,
    layout: str = STACKED,
) -> FolderContent:
    """The content of a folder for the adapter. Its factors may be on the meta device, except for
    "peft", whose recipe is added by `with_recipe`, since a plain adapter has none.

    `module_names`, `fan_in_fan_out` and `layout` are those of `to_peft`. "start" has two arguments
    of its own: `original`, the original base, of which `state.base_model` is the residual base; and
    `task_type`, for the configuration.
    """
    if format == PEFT:
        config, tensors = to_peft(state, module_names, fan_in_fan_out, layout=layout)
        parts = file_parts(state, layout)
        return FolderContent(ADAPTER_FILE, config, tensors, None, parts)
    recipes = {name: layer_to_dict(layer) for name, layer in state.layers.items()}
    if format == NATIVE:
        more: dict[str, Any] = {REPLICATION: state.replication} if state.replication else {}
        if expert_layers(state):
            more[EXPERTS] = experts_to_json(state.experts)
        recipe = recipe_to_json(recipes, NATIVE, state.config, state.base_model, **more)
        config = {"peft_type": NATIVE_TYPE, **json.loads(recipe)}
        return FolderContent(NATIVE_FILE, config, native_tensors(state), recipe)
    # The start was subtracted from the residual base: its adapter has nothing to subtract.
    layers = {
        name: replace(layer, beta=None, start_A=None, start_B=None)
        for name, layer in state.layers.items()
    }
    plain = replace(state, layers=layers, config=replace(state.config, task_type=task_type))
    config, tensors = to_peft(plain, module_names, fan_in_fan_out, portable=False)
    config["inference_mode"] = False
    recipe = recipe_to_json(recipes, START, state.config, state.base_model, original=original)
    return FolderContent(ADAPTER_FILE, config, tensors, recipe)


def with_recipe(content: FolderContent, state: AdapterState) -> FolderContent:
    """The content of a "peft" folder with the recipe from which the adapter is restored."""
    pairs = factors_of(content, state.layers)
    recipes = {name: portable_recipe(state.layers[name], *pair) for name, pair in pairs.items()}
    experts: dict[str, Any] = {}
    if content.parts:
        layout = layout_of(content.parts)
        stored = {n: replace(s, layout=layout) for n, s in state.experts.items()}
        experts = {EXPERTS: experts_to_json(stored), TENSORS: parts_to_json(content.parts)}
    recipe = recipe_to_json(
        within_header(recipes),
        PEFT,
        state.config,
        state.base_model,
        **experts,
        peft_config=content.config,
        rank_fields=rank_fields(
            {name: layer.scaling for name, layer in state.layers.items()},
            {name: layer.r for name, layer in state.layers.items()},
            rslora=state.config.scaling_rule != "lora",
        ),
    )
    return replace(content, recipe=recipe)
