"""Restores folders in the portable form to what PEFT would have written for the trained adapter."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from ..._utils.peft_names import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PREFIX,
    TARGET_PARAMETERS,
    factor_keys,
)
from ..._utils.safetensors import save_tensors
from ...files.adapter.content import NATIVE_FILE
from ...files.adapter.folder import read_files, warn_of_changed
from ...files.adapter.peft_format.experts.layouts import EACH, Pair, from_pairs, stacked
from ...files.adapter.peft_format.experts.writing import (
    Parts,
    layout_of,
    target_parameters,
    wrappers,
)
from ...files.adapter.peft_format.magnitudes import magnitude_key
from ...files.adapter.recipe import (
    METADATA,
    PEFT,
    TENSORS,
    layer_from_dict,
    parts_from_json,
    read_recipe,
    recipe_from_json,
)
from ...files.adapter.tensors import ChangedTensorsError, check_unedited, layer_factors
from ...layers.state import LayerState
from ..layers import lora_layers, pattern_name
from .portable import trained

Starts = dict[str, Pair]  # A₀ and B₀ by the names of PEFT's layers


def restored_folder(peft_model: peft.PeftModel, folder: Path, scratch: Path) -> Starts | None:
    """Writes the trained adapter into `scratch`, as PEFT does, and returns the starts. Returns None
    if PEFT can read the folder itself, because it has no recipe, or that of a start or of other
    tensors.
    """
    file = folder / ADAPTER_FILE
    if (folder / NATIVE_FILE).is_file() and not file.is_file():
        raise ValueError(
            f"{folder} has save_adapter's format='native', which lora_kernels.load_adapter reads; "
            "for PEFT save it with format='peft'"
        )
    recipe = read_recipe(file)
    if recipe is None or recipe["format"] != PEFT:
        return None
    # All files are read together: another process may be saving into the folder.
    config, _, tensors, metadata = read_files(folder)
    if METADATA not in metadata:  # PEFT itself has just replaced the file
        return None
    try:
        recipe = recipe_from_json(metadata[METADATA])
        check_unedited(recipe, config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    try:
        starts = _restore(tensors, recipe)
    except ChangedTensorsError as error:
        warn_of_changed(file, error)
        return None
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder}: the recipe does not fit its tensors: {error}") from None
    values = _at_trained_rank(config or recipe["peft_config"], recipe)
    adapted = _adapted(recipe)
    if adapted and (spelled := _targets_in(peft_model, adapted)) is not None:
        values[TARGET_PARAMETERS] = spelled
    (scratch / ADAPTER_CONFIG).write_text(json.dumps(values))
    save_tensors(tensors, scratch / ADAPTER_FILE, {})
    return starts


def _restore(tensors: dict[str, Tensor], recipe: dict[str, Any]) -> Starts:
    """Replaces a file's tensors by the trained ones; returns the starts."""
    starts = _restore_experts(tensors, recipe)
    parts = _parts(recipe)
    for name in recipe["layers"].keys() - parts.keys():
        key_A, key_B, key_bias = _stored_keys(name, tensors)
        others = tensors.get(key_bias), tensors.get(magnitude_key(name))
        state = _state(recipe, name, tensors[key_A], tensors[key_B], *others)
        start = state.start_factors()
        if start is not None:
            starts[name] = start
        tensors[key_A], tensors[key_B] = state.lora_A, state.lora_B
        if state.lora_bias is not None:
            tensors[key_bias] = state.lora_bias
    for name, other in recipe.get("others", {}).items():
        keys = _stored_keys(name, tensors)
        found = trained(other, *(tensors.get(key) for key in keys))
        tensors |= dict(zip(keys, found.values(), strict=False))
    return starts


def _restore_experts(tensors: dict[str, Tensor], recipe: dict[str, Any]) -> Starts:
    """Replaces the tensors of experts' parameters, in either layout, by PEFT's tensors, and removes
    the tensors of parameters that are not adapted.
    """
    parts, adapted = _parts(recipe), _adapted(recipe)
    pairs: dict[str, Pair] = {}
    for name in parts:
        for own in (own for part in parts[name] for own in part.names(_number(recipe, name))):
            key_A, key_B = factor_keys(own, tensors)
            pairs[own] = tensors.pop(key_A), tensors.pop(key_B)
    starts: Starts = {}
    for name, place in wrappers(adapted).items():
        try:
            right, left = from_pairs(pairs, parts[name], recipe["layers"][name]["experts"])
        except ValueError as error:
            raise ChangedTensorsError(str(error)) from None
        state = _state(recipe, name, right, left, None, None)
        tensors |= zip(factor_keys(place, ()), stacked(state.lora_A, state.lora_B), strict=True)
        start = state.start_factors()
        if start is not None:
            starts[place] = stacked(*start)
    return starts


def _state(
    recipe: dict[str, Any],
    name: str,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    magnitude: Tensor | None,
) -> LayerState:
    factors = layer_factors(recipe, name, right, left, bias, magnitude)
    return layer_from_dict(recipe["layers"][name], factors)


def _at_trained_rank(config: Mapping[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """The configuration that belongs to the tensors after `_restore`."""
    values = {**config, **recipe["rank_fields"]}
    parts, adapted = _parts(recipe), _adapted(recipe)
    if parts and (len(adapted) < len(parts) or layout_of(parts) == EACH):
        values[TARGET_PARAMETERS] = target_parameters(adapted, None)
    if parts and layout_of(parts) == EACH:  # for PEFT, the experts were linear layers
        linear = [name for name in recipe["layers"] if name not in parts]
        values |= {"target_modules": sorted(linear), "exclude_modules": None}
    return values


def _targets_in(peft_model: peft.PeftModel, parameters: Collection[str]) -> list[str] | None:
    """`target_parameters` of an adapter of the model that adapts exactly these parameters; else
    None. PEFT refuses a second adapter that spells the same parameters differently.
    """
    wrapped = {
        pattern_name(name, layer)
        for name, layer in lora_layers(peft_model).items()
        if isinstance(layer, ParamWrapper)
    }
    if wrapped != set(parameters):
        return None
    options = [config.target_parameters for config in peft_model.peft_config.values()]
    return next((list(targets) for targets in options if targets), None)


def _parts(recipe: dict[str, Any]) -> Parts:
    """The tensors of the file that hold experts' parameters."""
    return parts_from_json(recipe.get(TENSORS, {}))


def _adapted(recipe: dict[str, Any]) -> list[str]:
    """The experts' parameters that were trained; files also have their neighbors, as zeros."""
    return [name for name in _parts(recipe) if name in recipe["layers"]]


def _number(recipe: dict[str, Any], parameter: str) -> int:
    """The number of experts of a parameter; if it was not trained, of a trained one beside it."""
    module = parameter.rpartition(".")[0]
    beside = (n for n in _adapted(recipe) if n.rpartition(".")[0] == module)
    experts: int = recipe["layers"][next(beside)]["experts"]
    return experts


def _stored_keys(name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str, str]:
    """The names of a layer's A, B and B's bias in a file, which may lack the bias."""
    return *factor_keys(name, tensors), f"{PREFIX}{name}.lora_B.bias"
