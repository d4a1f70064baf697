"""Saves adapters of `initialize` in PEFT's folders, and loads them exactly as they were.

A folder holds A' = [A; A₀], B' = [B, −B₀] of rank 2r with the same s, so that plain PEFT computes
W + s·(BA − B₀A₀) on the original base. The recipe for splitting them is in the header of the
safetensors file, which plain PEFT does not read. It is that of `lora_kernels.save_adapter`: each
reads the other's files.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
from peft.utils.warning import PeftWarning
from torch import Tensor

from .._utils.model_files import read_json
from .._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE, PREFIX
from .._utils.safetensors import load_tensors, save_tensors
from ..files.adapter.content import NATIVE_FILE, FolderContent
from ..files.adapter.recipe import PEFT, read_recipe, recipe_to_json
from ..files.adapter.tensors import check_unedited, split_halves
from ..layers.options import lora_scaling
from ..layers.state import LayerState, with_start
from .layers import adapters_with_start, has_adapter, lora_layers, pattern_name
from .variant import set_start, silently_loaded, start_of

# The options of the configuration that rank 2r changes.
_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights")


def save_pretrained(
    peft_model: peft.PeftModel,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    path_initial_model_for_weight_conversion: str | None = None,
    **kwargs: Any,
) -> None:
    """PEFT's `save_pretrained`; adapters that subtract a start are written with rank 2r.

    Raises:
        ValueError: such an adapter should be pickled, or converted, which is unnecessary; or
            `state_dict` lacks it.

    """
    own = type(peft_model).save_pretrained
    names = list(peft_model.peft_config) if selected_adapters is None else selected_adapters
    doubled = [name for name in names if name in adapters_with_start(peft_model)]
    if doubled and not safe_serialization:
        raise ValueError(
            "safe_serialization=False pickles the adapter, which cannot store the start's recipe"
        )
    if doubled and path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "path_initial_model_for_weight_conversion is not needed: save_pretrained writes "
            "adapters for the original base anyway"
        )
    others = [name for name in names if name not in doubled]
    common = {"save_embedding_layers": save_embedding_layers, "is_main_process": is_main_process}
    own(
        peft_model,
        save_directory,
        safe_serialization,
        others,
        path_initial_model_for_weight_conversion=path_initial_model_for_weight_conversion,
        **common,
        **kwargs,
    )
    state = kwargs.pop("state_dict", None) if doubled else None
    for name in doubled:
        folder = Path(save_directory) / ("" if name == "default" else name)
        tensors = peft_model.state_dict() if state is None else state
        if is_main_process:  # the others may have none, and write nothing
            _check_state(peft_model, name, tensors)
        halves = _doubled_state(peft_model, name, tensors)
        with TemporaryDirectory() as scratch, _doubled_config(peft_model, name) as fields:
            own(peft_model, scratch, True, [name], state_dict=halves, **common, **kwargs)
            if is_main_process:
                written = Path(scratch) / folder.relative_to(save_directory)
                _publish(written, folder, _layer_states(peft_model, name, tensors), fields)


def load_adapter(
    peft_model: peft.PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """PEFT's `load_adapter`; if `save_pretrained` or `lora_kernels.save_adapter` wrote the folder
    with rank 2r, it is split into A, B and the start that the layers subtract. With any other
    folder, the layers whose A and B are loaded subtract nothing.

    Raises:
        ValueError: the file is damaged or has `save_adapter`'s format="native", its recipe is of
            another version, or its configuration was edited.
        RuntimeError: the adapter is merged.

    """
    own = type(peft_model).load_adapter
    layers = lora_layers(peft_model)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise RuntimeError(
            f"{adapter_name!r} is merged into the base: call unmerge_adapter() first"
        )
    folder = Path(model_id) / (kwargs.get("subfolder") or "")
    recipe = _read_recipe(folder)
    if recipe is None:
        with silently_loaded():
            result, starts = own(peft_model, model_id, adapter_name, *args, **kwargs), {}
    else:
        kwargs.pop("subfolder", None)
        with TemporaryDirectory() as scratch, silently_loaded():
            try:
                starts = _split(folder, Path(scratch), recipe)
            except KeyError as error:
                raise ValueError(
                    f"{folder}: the recipe does not fit its tensors: {error}"
                ) from None
            result = own(peft_model, scratch, adapter_name, *args, **kwargs)
    # Where A and B were loaded without a start, the layer has dropped its own already.
    for name, layer in lora_layers(peft_model).items():
        if name in starts and adapter_name in layer.lora_A:
            set_start(layer, adapter_name, *starts[name])
    return result


def _keys(name: str, adapter: str) -> tuple[str, str]:
    """The names of A and B in the model's state_dict."""
    return f"{PREFIX}{name}.lora_A.{adapter}.weight", f"{PREFIX}{name}.lora_B.{adapter}.weight"


def _check_state(peft_model: peft.PeftModel, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Warns, as PEFT does, of factors that are not gathered: they cannot be read again.

    Raises:
        ValueError: a factor is missing, or PEFT's hot-swapping changed its rank, which PEFT's
            configuration does not tell.

    """
    empty = []
    for name, layer in lora_layers(peft_model).items():
        if adapter not in layer.lora_A:
            continue
        keys = _keys(name, adapter)
        started = start_of(layer, adapter) is not None
        if started and (missing := set(keys) - state.keys()):
            raise ValueError(f"state_dict lacks {min(missing)!r}")
        if not all(_is_gathered(state[key]) for key in keys if key in state):
            empty.append(name)
        elif started and len(state[keys[0]]) != layer.r[adapter]:
            raise ValueError(
                f"lora_A of {name!r} has rank {len(state[keys[0]])}, but {layer.r[adapter]} in the "
                "configuration: PEFT's hot-swapping changed it; save the adapter before, or copy "
                "the folder that was swapped in"
            )
    if empty:
        warnings.warn(
            f"Adapter {adapter!r}: lora_A or lora_B of {len(empty)} layer(s) have an invalid shape "
            f"({', '.join(empty[:3])}{' ...' if len(empty) > 3 else ''}): they are shards of "
            "DeepSpeed ZeRO-3 or FSDP, and the saved adapter is incomplete. Gather them before "
            "save_pretrained(), or pass a gathered state_dict",
            PeftWarning,
            stacklevel=4,
        )


def _is_gathered(factor: Tensor) -> bool:
    """Whether the factor is a matrix, not a shard of DeepSpeed ZeRO-3 or FSDP."""
    return factor.dim() == 2 and factor.numel() > 0


def _doubled_state(
    peft_model: peft.PeftModel, adapter: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state_dict with A' and B' in place of A and B, and without the starts."""
    state = dict(state)
    for name, layer in lora_layers(peft_model).items():
        for other in layer.lora_A:
            start = start_of(layer, other)
            if start is None:
                continue
            for part in ("lora_start_A", "lora_start_B"):
                state.pop(f"{PREFIX}{name}.{part}.{other}", None)
            key_A, key_B = _keys(name, adapter)
            if other != adapter or not {key_A, key_B} <= state.keys():
                continue
            A, B = state[key_A], state[key_B]
            if _is_gathered(A) and _is_gathered(B):
                state[key_A], state[key_B] = with_start(A, B, start)
    return state


@contextmanager
def _doubled_config(peft_model: peft.PeftModel, adapter: str) -> Iterator[dict[str, Any]]:
    """Sets the adapter's configuration to rank 2r for a while; yields its options at rank r."""
    config = peft_model.peft_config[adapter]
    doubled = copy.deepcopy(config)
    factor = math.sqrt(2) if config.use_rslora else 2  # s stays
    doubled.r, doubled.lora_alpha = 2 * config.r, factor * config.lora_alpha
    doubled.init_lora_weights = True
    # One pattern for each layer, because PEFT sorts them, and the first that matches is used.
    doubled.rank_pattern, doubled.alpha_pattern = {}, {}
    for name, layer in lora_layers(peft_model).items():
        if has_adapter(layer, adapter):
            r, alpha = layer.r[adapter], layer.lora_alpha[adapter]
            if start_of(layer, adapter) is not None:
                r, alpha = 2 * r, factor * alpha
            exact = f"^{re.escape(pattern_name(name, layer))}"
            if r != doubled.r:
                doubled.rank_pattern[exact] = r
            if alpha != doubled.lora_alpha:
                doubled.alpha_pattern[exact] = alpha
    fields = {name: getattr(config, name) for name in _FIELDS}
    peft_model.peft_config[adapter] = doubled
    try:
        yield fields
    finally:
        peft_model.peft_config[adapter] = config


def _layer_states(
    peft_model: peft.PeftModel, adapter: str, state: Mapping[str, Tensor]
) -> dict[str, LayerState]:
    """The adapter of each layer that has it, except embeddings; A and B are those of the
    state_dict, because the layer's may be shards.
    """
    rule = "rslora" if peft_model.peft_config[adapter].use_rslora else "lora"
    states = {}
    for name, layer in lora_layers(peft_model).items():
        if adapter in layer.lora_A:
            key_A, key_B = _keys(name, adapter)
            start_A, start_B = start_of(layer, adapter) or (None, None)
            r, alpha = layer.r[adapter], layer.lora_alpha[adapter]
            states[name] = LayerState(
                state.get(key_A, layer.lora_A[adapter].weight),
                state.get(key_B, layer.lora_B[adapter].weight),
                lora_scaling(alpha, r, rule),
                alpha,
                start_A=start_A,
                start_B=start_B,
                residual="implicit",
            )
    return states


def _publish(
    written: Path, folder: Path, layers: Mapping[str, LayerState], fields: Mapping[str, Any]
) -> None:
    """Moves what PEFT wrote into the folder and adds the recipe; a killed process leaves the old
    files.
    """
    tensors, _ = load_tensors(written / ADAPTER_FILE)
    config = read_json(written / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    recipe = recipe_to_json(layers, PEFT, None, base, peft_config=config, rank_fields=fields)
    content = FolderContent(ADAPTER_FILE, config, tensors, recipe)
    content.write(folder, (ADAPTER_CONFIG, ADAPTER_FILE))


def _read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe; None if there is none, or it is one of a start, which PEFT reads itself."""
    file = folder / ADAPTER_FILE
    if (folder / NATIVE_FILE).is_file() and not file.is_file():
        raise ValueError(
            f"{folder} has save_adapter's format='native', which lora_kernels.load_adapter reads; "
            "for PEFT save it with format='peft'"
        )
    recipe = read_recipe(file)
    if recipe is None or recipe["format"] != PEFT:
        return None
    try:
        check_unedited(recipe, read_json(folder / ADAPTER_CONFIG))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return recipe


def _split(folder: Path, scratch: Path, recipe: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Writes the adapter of rank r into `scratch`, as PEFT does; returns the starts."""
    tensors, _ = load_tensors(folder / ADAPTER_FILE)
    starts = {}
    for name, layer in recipe["layers"].items():
        if not layer.get("start"):
            continue
        key_A, key_B = (f"{PREFIX}{name}.{part}.weight" for part in ("lora_A", "lora_B"))
        factors = split_halves(name, layer, tensors[key_A], tensors[key_B])
        starts[name] = factors["start_A"], factors["start_B"]
        tensors[key_A], tensors[key_B] = factors["lora_A"], factors["lora_B"]
    config = read_json(folder / ADAPTER_CONFIG) | recipe["rank_fields"]
    (scratch / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_tensors(tensors, scratch / ADAPTER_FILE, {})
    return starts
