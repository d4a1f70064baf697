"""What the files in an adapter's folder contain, in each format.

"peft": `adapter_config.json` and `adapter_model.safetensors`, which give the adapted model on the
original base, whatever the start (see `peft_format`). "start": the same two files, for a base from
which the start was subtracted. "native": `adapter_native.safetensors`, another name on purpose,
holds A, B, R and those initial factors that cannot be recomputed, at their own rank.

In all of them the recipe, from which training continues exactly, is in the header of the tensors,
which PEFT and serving engines do not read.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE
from ..._utils.safetensors import save_tensors
from ...layers.state import LayerState
from ...model.config import AdapterState, LoRAConfig
from ..io.replace import replace_files
from .peft_format import rank_fields, to_peft
from .recipe import METADATA, NATIVE, PEFT, START, recipe_to_json
from .tensors import native_tensors

NATIVE_FILE = "adapter_native.safetensors"
NATIVE_TYPE = "LORA_KERNELS"  # its peft_type, which PEFT does not know
ADAPTER_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_FILE, NATIVE_FILE})


@dataclass(frozen=True)
class FolderContent:
    """`config` is the content of `adapter_config.json`; `tensors` and `metadata` are in `file`."""

    file: str
    config: dict[str, Any]
    tensors: Mapping[str, Tensor]
    metadata: dict[str, str]

    def write(self, folder: Path, owned: Collection[str] = ADAPTER_FILES) -> dict[str, int]:
        """Replaces the adapter in a folder, as `replace_files`; returns the sizes by name."""
        config = json.dumps(self.config, indent=2, allow_nan=False).encode()
        replace_files(
            folder,
            self.file,
            lambda path: save_tensors(self.tensors, path, self.metadata),
            {ADAPTER_CONFIG: config},
            owned,
        )
        return {self.file: (folder / self.file).stat().st_size, ADAPTER_CONFIG: len(config)}


def folder_content(
    state: AdapterState,
    format: str,
    *,
    module_names: Collection[str] | None = None,
    fan_in_fan_out: bool = False,
    has_recipe: bool = True,
    original: str | None = None,
    task_type: str | None = None,
) -> FolderContent:
    """What a folder contains that holds the adapter in the format "peft", "native" or "start".

    Args:
        state: the adapter. Its factors may be on the meta device.
        format: see above.
        module_names: as `to_peft`; unused for "native".
        fan_in_fan_out: as `to_peft`; unused for "native".
        has_recipe: False for a "peft" adapter that is read like one of PEFT.
        original: for "start": the original base. `state.base_model` is the residual base.
        task_type: for "start": what the configuration says.

    """
    if format == NATIVE:
        recipe = recipe_to_json(state.layers, NATIVE, state.config, state.base_model)
        config = {"peft_type": NATIVE_TYPE, **json.loads(recipe)}
        return FolderContent(NATIVE_FILE, config, native_tensors(state), {METADATA: recipe})
    if format == PEFT:
        config, tensors = to_peft(state, module_names, fan_in_fan_out)
        if not has_recipe:
            return FolderContent(ADAPTER_FILE, config, tensors, {})
        fields = rank_fields(state, {name: layer.r for name, layer in state.layers.items()})
        return peft_content(config, tensors, state.layers, fields, state.config)
    # The residual base lacks the start: on it nothing is subtracted.
    layers = {
        name: replace(layer, beta=None, start_A=None, start_B=None)
        for name, layer in state.layers.items()
    }
    plain = replace(state, layers=layers, config=replace(state.config, task_type=task_type))
    config, tensors = to_peft(plain, module_names, fan_in_fan_out)
    config["inference_mode"] = False
    recipe = recipe_to_json(state.layers, START, state.config, state.base_model, original=original)
    return FolderContent(ADAPTER_FILE, config, tensors, {METADATA: recipe})


def peft_content(
    peft_config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, LayerState],
    fields: Mapping[str, Any],
    config: LoRAConfig | None = None,
) -> FolderContent:
    """The content in the format "peft", with the recipe.

    Args:
        peft_config: the content of `adapter_config.json`.
        tensors: those of PEFT's format, with the initial factors in the second half of the rank.
        layers: the adapter of each layer, for the recipe.
        fields: those of `rank_fields` at the rank that is trained.
        config: None for an adapter of a PEFT model.

    """
    base_model = peft_config.get("base_model_name_or_path")
    more = {"peft_config": peft_config, "rank_fields": fields}
    recipe = recipe_to_json(layers, PEFT, config, base_model, **more)
    return FolderContent(ADAPTER_FILE, peft_config, tensors, {METADATA: recipe})
