"""What the files in an adapter's folder contain, in each format.

"peft": `adapter_config.json` and `adapter_model.safetensors`. Every loader computes the adapted
model from them on the original base, whatever the start was (see `portable`). "start": the same two
files, for a base from which the start was subtracted. "native": `adapter_native.safetensors`
(deliberately not PEFT's file name) holds A, B, R and the initial factors that cannot be recomputed,
each layer at its own rank. "diffusers": the content of "peft" in
`pytorch_lora_weights.safetensors`; the file's header has the configuration, and the tensors' names
begin with the name of a pipeline's model.

In every format, the header of the file of tensors has the recipe, from which training continues
exactly. PEFT and serving engines do not read the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._utils.checks import all_finite
from ..._utils.errors import unknown_name
from ..._utils.peft_names import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PREFIX,
    REPLICATION,
    as_factor,
    factor_keys,
)
from ..._utils.safetensors import save_tensors
from ...layers.state import LayerState
from ...model.config import AdapterState
from ..io.replace import replace_files
from .peft_format.experts.layouts import STACKED, Pair, from_pairs, to_pairs
from .peft_format.experts.writing import Parts, expert_layers, file_parts, layout_of
from .peft_format.shapes import from_file, name_in_file, to_file
from .peft_format.writing import portable_fields, rank_fields, to_peft
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
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_METADATA = "lora_adapter_metadata"
# The models of a pipeline that diffusers loads adapters into. A tensor's name begins with one.
COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "controlnet",
    "prior",
)
NATIVE_TYPE = "LORA_KERNELS"  # its peft_type, which PEFT does not know
ADAPTER_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_FILE, NATIVE_FILE})


@dataclass(frozen=True)
class FolderContent:
    """`config` is the content of `adapter_config.json`; `tensors` and `recipe` are in `file`.
    `parts` are the tensors that hold experts, by the names of the layers. For the format
    "diffusers", `component` is the pipeline's model.
    """

    file: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    recipe: str | None
    parts: Parts = field(default_factory=dict)
    component: str = ""

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of `file`."""
        found = {METADATA: self.recipe} if self.recipe else {}
        if not self.component:
            return found
        options = {f"{self.component}.{key}": value for key, value in self.config.items()}
        return found | {"format": "pt", DIFFUSERS_METADATA: json.dumps(options, allow_nan=False)}

    def write(self, folder: Path, owned: Collection[str] = ADAPTER_FILES) -> dict[str, int]:
        """Replaces the adapter in a folder by `replace_files`; returns {file: size in bytes}.

        Raises:
            ValueError: a tensor is not finite, because s·B was too large; nothing is written then.
            OSError: see `replace_files`.

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
            {} if self.component else {ADAPTER_CONFIG: config},
            {self.file} if self.component else owned,
        )
        sizes = {self.file: size}
        return sizes if self.component else sizes | {ADAPTER_CONFIG: len(config)}


def as_diffusers(content: FolderContent, component: str) -> FolderContent:
    """Turns the content of a "peft" folder into a diffusers file for a pipeline's model.

    Raises:
        ValueError: an unknown component, or tensors that diffusers refuses.

    """
    if component not in COMPONENTS:
        raise unknown_name("component", component, COMPONENTS)
    others = [name for name in content.tensors if "lora_" not in name.removeprefix(PREFIX)]
    if others:
        raise ValueError(
            f"diffusers loads nothing but factors, and the adapter has {others[0]!r} too "
            "(modules_to_save, bias, trainable_token_indices): use format='peft'"
        )
    tensors = {
        f"{component}.{name.removeprefix(PREFIX)}": tensor
        for name, tensor in content.tensors.items()
    }
    return replace(content, file=DIFFUSERS_FILE, tensors=tensors, component=component)


def from_diffusers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a diffusers file, with PEFT's names. A file without
    options has s = 1.

    Raises:
        ValueError: it holds adapters of several models, a tensor <layer>.alpha, or damaged options.

    """
    starts = {key.partition(".")[0] for key in tensors}
    component = next(iter(starts), "") if starts <= set(COMPONENTS) else ""
    if len(starts) > 1 and starts & set(COMPONENTS):
        raise ValueError(f"it holds the adapters of {', '.join(sorted(starts))}: keep one of them")
    if any(key.endswith(".alpha") for key in tensors):
        raise ValueError(
            "it has tensors <layer>.alpha, which pipelines read in different ways: load it with "
            "diffusers and save it again with save_lora_weights"
        )
    begin = f"{component}." if component else ""
    named = {PREFIX + key.removeprefix(begin): tensor for key, tensor in tensors.items()}
    try:
        options = json.loads(metadata.get(DIFFUSERS_METADATA, "null"))
        config = None if options is None else dict(options)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{DIFFUSERS_METADATA} in its header is damaged") from None
    if config is not None:
        own = {key.removeprefix(begin): value for key, value in config.items()}
        return {"peft_type": "LORA", **own}, named
    factors = {key: as_factor(key.removeprefix(PREFIX)) for key in named}
    ranks = {f.layer: len(named[key]) for key, f in factors.items() if f and f.half == "A"}
    return {"peft_type": "LORA", **portable_fields(max(ranks.values(), default=1), ranks)}, named


def factors_of(content: FolderContent, layers: Mapping[str, LayerState]) -> dict[str, Pair]:
    """A' and B' of these layers in a file of the format "peft"; 3-D for experts."""

    def pair(name: str) -> Pair:
        key_A, key_B = factor_keys(name, content.tensors)
        return content.tensors[key_A], content.tensors[key_B]

    found = {}
    for name, layer in layers.items():
        parts, experts = content.parts.get(name, ()), layer.experts or 1
        pairs = {own: pair(own) for part in parts for own in part.names(experts)}
        if parts:
            found[name] = from_pairs(pairs, parts, experts)
        else:
            place = name_in_file(name, layers)
            found[name] = from_file(name, pair(place), place != name)
    return found


def with_factors(
    content: FolderContent, layers: Mapping[str, LayerState], factors: Mapping[str, Pair]
) -> FolderContent:
    """The content with A' and B' of `layers` replaced by factors of the same shapes."""
    tensors = dict(content.tensors)
    for name, (right, left) in factors.items():
        parts, place = content.parts.get(name, ()), name_in_file(name, layers)
        if parts:
            pairs = to_pairs(right, left, parts)
        else:
            pairs = {place: to_file(layers[name], (right, left), place != name)}
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
    """The content of a folder for the adapter.

    The factors may be on the meta device, except for "peft". A "peft" folder gets its recipe from
    `with_recipe`, because a plain adapter has none.

    For `module_names`, `fan_in_fan_out` and `layout` see `to_peft`. Two arguments are for "start"
    only: `original`, the original base (`state.base_model` is the residual base), and `task_type`,
    for the configuration.
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
    # The start was subtracted from the residual base, so that the adapter subtracts nothing.
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
    """Adds the recipe from which the adapter is restored to the content of a "peft" folder."""
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
