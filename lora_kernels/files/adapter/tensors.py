"""Converts an `AdapterState` to the tensors of a file, and back with the help of the recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._utils.checks import FLOATS
from ..._utils.peft_names import ADAPTER_CONFIG
from ...init.fused import check_parts
from ...layers.state import FACTORS, LayerState
from ...model.config import AdapterState, ExpertPart, TokenRows
from .peft_format.biases import check_biases, split_biases
from .peft_format.experts.layouts import from_pairs
from .peft_format.magnitudes import checked_magnitudes, split_magnitudes
from .peft_format.reading import (
    DECISIVE,
    check_options,
    check_pair,
    config_from_peft,
    replication,
    split_tensors,
)
from .peft_format.shapes import name_in_file, of_peft_model, own_names
from .peft_format.tokens import split_rows
from .portable import checksum, trained_factors, unscaled
from .recipe import (
    EXPERTS,
    PEFT,
    TENSORS,
    config_from_dict,
    experts_from_json,
    layer_from_dict,
    parts_from_json,
)

# Entries of a layer's recipe which say that the layer has a factor.
_OPTIONAL = {
    "R": "lora_R",
    "bias": "lora_bias",
    "magnitude": "lora_magnitude",
    "diag": "lora_diag",
}


class ChangedTensorsError(ValueError):
    """The tensors of a file are not those for which its recipe was written."""


def check_state(state: AdapterState) -> None:
    """Raises ValueError unless the adapter can be written and read again."""
    if not state.layers:
        raise ValueError("the adapter has no layers")
    known = [name for name in state.layers if name in state.experts]
    unclear = [name for name in known if state.experts[name].exchanged is not False]
    if unclear:
        raise ValueError(
            f"whether A and B of the experts {unclear[0]!r} are exchanged, as PEFT before 0.19 "
            "wrote them, only the model tells: give its folder (--base of lora-kernels convert)"
        )
    with_norms = [n for n, layer in state.layers.items() if layer.lora_magnitude is not None]
    if with_norms and len(with_norms) < len(state.layers):
        other = next(name for name in state.layers if name not in with_norms)
        raise ValueError(
            f"{with_norms[0]!r} has DoRA's magnitudes and {other!r} has none: an adapter has them "
            "in all layers or in none"
        )
    for name, layer in state.layers.items():
        experts = len(layer.lora_A) if layer.lora_A.dim() > 2 else None
        check_pair(name, layer.lora_A, layer.lora_B, experts is not None)
        _check_layer(name, layer, layer.r, experts)
        for key in FACTORS:
            factor = getattr(layer, key)
            if factor is not None and not bool(factor.isfinite().all()):
                raise ValueError(f"{key} of {name!r} holds NaN or Inf; nothing was written")
    others = {**state.extra, **{name: row.values for name, row in state.rows.items()}}
    for name, tensor in others.items():
        if tensor.dtype in FLOATS and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or Inf; nothing was written")


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a tensor of a file holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or Inf; take an earlier adapter")


def native_tensors(state: AdapterState) -> dict[str, Tensor]:
    """A, B, R and stored initial factors, by this package's names."""
    tensors = {f"extra.{name}": tensor for name, tensor in state.extra.items()}
    for name, row in state.rows.items():
        tensors[f"rows.{name}"] = row.values
        tensors[f"tokens.{name}"] = torch.tensor(row.indices)
    for name, layer in state.layers.items():
        for key in FACTORS:
            factor = getattr(layer, key)
            if factor is not None:
                tensors[f"layers.{name}.{key}"] = factor
    return tensors


def from_recipe(
    recipe: dict[str, Any],
    config: dict[str, Any] | None,
    tensors: dict[str, Tensor],
) -> AdapterState:
    """Restores an adapter that this package wrote.

    Args:
        recipe: the file's recipe, from `recipe_from_json`.
        config: the content of `adapter_config.json`, if it exists.
        tensors: all tensors of the file.

    Raises:
        ChangedTensorsError: A and B were changed after they were saved.
        ValueError: the arguments do not fit each other.

    """
    if recipe["format"] == PEFT and recipe["config"] is None:
        recipe = of_peft_model(recipe, tensors)
    rows, tensors = _split_rows(recipe, tensors)
    if recipe["format"] == PEFT:
        check_unedited(recipe, config)
        factors, extra = _split_peft(recipe, tensors)
    else:
        factors, extra = _split_native(recipe, tensors)
    layers = {}
    known = experts_from_json(recipe.get(EXPERTS, {}))
    for name, layer in recipe["layers"].items():
        try:
            layers[name] = layer_from_dict(layer, factors[name])
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the recipe of {name!r} is damaged: {error}") from None
        _check_layer(name, layers[name], layer["r"], layer.get("experts"))
    if recipe["config"] is None:
        values = recipe["peft_config"] | recipe["rank_fields"]
        check_options(values)
        linear = tuple(name for name, layer in layers.items() if layer.experts is None)
        parameters = tuple(name for name in layers if name not in linear)
        adapted = config_from_peft(values, linear, parameters)
    else:
        adapted = config_from_dict(recipe["config"])
    repeated = replication(recipe.get("peft_config", recipe))
    return AdapterState(adapted, layers, extra, recipe["base_model"], rows, repeated, known)


def _split_rows(
    recipe: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, TokenRows], dict[str, Tensor]]:
    """Rows of embeddings by the names of their weights, and all other tensors."""
    if recipe["format"] == PEFT:
        return split_rows(recipe["peft_config"], tensors)
    rows, others = {}, {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "tokens":
            if f"rows.{name}" not in tensors:
                raise ValueError(f"the rows of {name!r} are missing")
            rows[name] = TokenRows(tuple(tensor.tolist()), tensors[f"rows.{name}"])
        elif kind != "rows":
            others[key] = tensor
    return rows, others


def check_unedited(recipe: dict[str, Any], config: dict[str, Any] | None) -> None:
    """Raises ValueError if `adapter_config.json` does not belong to the tensors. The configuration
    may be missing: it is written last, and the process may have been killed before.
    """
    if config is None:
        return
    saved = recipe["peft_config"]
    for key in DECISIVE:
        if (config.get(key) or None) != (saved.get(key) or None):  # {} is the same as None
            raise ValueError(
                f"{ADAPTER_CONFIG} says {key} = {config.get(key)!r}, but this was saved with "
                f"{saved.get(key)!r}: it was edited, or belongs to another adapter; to use what "
                f"was saved, remove {ADAPTER_CONFIG}"
            )


def _split_peft(
    recipe: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The factors of each layer, without recomputable initial factors, and all other tensors."""
    if recipe.get("others"):
        raise ValueError(
            f"{', '.join(recipe['others'])}: lora_kernels.peft has saved what is not read here, "
            "such as the adapters of convolutions with groups, of matrices and experts that are "
            "parameters, and of embeddings by versions that gave these no start; load it with PEFT"
        )
    by_peft = recipe["config"] is None
    config = recipe["peft_config" if by_peft else "config"]
    saved = config.get("modules_to_save") or ()
    biases, tensors = split_biases(recipe["peft_config"], tensors)
    magnitudes, tensors = split_magnitudes(recipe["peft_config"], tensors)
    parts = parts_from_json(recipe.get(TENSORS, {}))
    pairs, extra = split_tensors(tensors, saved, _names_in_file(recipe, parts), by_peft)
    biases, magnitudes = own_names(biases, pairs), own_names(magnitudes, pairs)
    pairs = _joined(recipe, parts, pairs)
    _check_names(recipe["layers"], pairs)
    rows = {name: left.shape[-2] for name, (_, left) in pairs.items()}
    check_biases(biases, rows, ())
    magnitudes = checked_magnitudes(magnitudes, rows, ())
    factors = {
        name: layer_factors(recipe, name, *pairs[name], biases.get(name), magnitudes.get(name))
        for name in recipe["layers"]
    }
    return factors, extra


def _names_in_file(
    recipe: dict[str, Any], parts: Mapping[str, tuple[ExpertPart, ...]]
) -> list[str]:
    """The names of the layers in the file, which has several names for one layer of experts."""
    names = [name_in_file(n, recipe["layers"]) for n in recipe["layers"] if n not in parts]
    return [*names, *(own for name in parts for own in _of_experts(recipe, parts, name))]


def _of_experts(
    recipe: dict[str, Any], parts: Mapping[str, tuple[ExpertPart, ...]], name: str
) -> list[str]:
    """The names in the file of the tensors of one parameter of experts. A parameter that is not
    adapted has as many experts as the adapted one beside it.
    """
    module = name.rpartition(".")[0]
    numbers = [
        layer.get("experts")
        for other, layer in recipe["layers"].items()
        if other == name or other.rpartition(".")[0] == module
    ]
    number = next((n for n in numbers if type(n) is int), 1)
    return [own for part in parts[name] for own in part.names(number)]


def _joined(
    recipe: dict[str, Any],
    parts: Mapping[str, tuple[ExpertPart, ...]],
    pairs: dict[str, tuple[Tensor, Tensor]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of all layers, 3-D for experts, without the zeros that `to_peft` adds.

    Raises:
        ChangedTensorsError: the tensors are not those that were saved.

    """
    found = dict(pairs)
    for name in parts:
        names = _of_experts(recipe, parts, name)
        try:
            own = {other: found.pop(other) for other in names}
            if name in recipe["layers"]:
                found[name] = from_pairs(own, parts[name], recipe["layers"][name]["experts"])
        except KeyError as error:
            raise ValueError(f"the tensors of {error} are missing") from None
        except ValueError as error:
            raise ChangedTensorsError(str(error)) from None
        if name not in recipe["layers"] and any(bool(B.any()) for _, B in own.values()):
            raise ChangedTensorsError(f"{name!r}, which was not adapted, has an update")
    return found


def layer_factors(
    recipe: dict[str, Any],
    name: str,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    magnitude: Tensor | None,
) -> dict[str, Tensor]:
    """The factors of one layer for `layer_from_dict`, from the factors in PEFT's file, from B's
    bias [out] and DoRA's magnitudes [out] if the file has them, and from the recipe.

    Raises:
        ChangedTensorsError: the tensors were changed after they were saved.
        ValueError: the tensors do not fit the recipe.

    """
    layer = recipe["layers"][name]
    check_pair(name, lora_A, lora_B, layer.get("experts") is not None)
    if layer.get("checksum", found := checksum(lora_A, lora_B)) != found:
        raise ChangedTensorsError(f"lora_A or lora_B of {name!r} is not the one that was saved")
    split = _doubled_factors if recipe["version"] == 1 else trained_factors
    try:
        factors = split(layer, lora_A, lora_B)
    except ValueError as error:
        raise ValueError(f"{error} ({name})") from None
    if layer.get("bias"):
        if bias is None:
            raise ValueError(f"the bias of lora_B of {name!r} is missing")
        factors["lora_bias"] = unscaled(bias, layer["scaling"])
    if bool(layer.get("magnitude")) != (magnitude is not None):
        what = "not in its recipe" if magnitude is not None else "missing"
        raise ValueError(f"the lora_magnitude_vector of {name!r} is {what}")
    if magnitude is not None:
        factors["lora_magnitude"] = magnitude.clone()
    return factors


def _doubled_factors(layer: dict[str, Any], right: Tensor, left: Tensor) -> dict[str, Tensor]:
    """Splits [A; A₀] and [B, −B₀], as version 1 wrote them, into A and B, and A₀ and B₀ if the
    layer stores them.
    """
    r, start = layer["r"], layer.get("start")
    if right.shape[0] != (2 * r if start else r):
        raise ValueError(f"lora_A has {right.shape[0]} rows, its recipe has r = {r}")
    factors = {"lora_A": right[:r].clone(), "lora_B": left[:, :r].clone()}
    if start == "kept":
        factors |= {"start_A": right[r:].clone(), "start_B": -left[:, r:]}
    return factors


def _split_native(
    recipe: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    factors: dict[str, dict[str, Tensor]] = {}
    extra = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "extra":
            extra[name] = tensor
            continue
        layer, _, part = name.rpartition(".")
        if kind != "layers" or part not in FACTORS:
            raise ValueError(f"{key!r} is not a tensor of an adapter")
        factors.setdefault(layer, {})[part] = tensor
    _check_names(recipe["layers"], factors)
    for name, layer in recipe["layers"].items():
        expected = {"lora_A", "lora_B"}
        expected |= {"start_A", "start_B"} if layer.get("start") == "kept" else set()
        for key, factor in _OPTIONAL.items():
            expected |= {factor} if layer.get(key) else set()
        if factors[name].keys() != expected:
            wrong = ", ".join(sorted(factors[name].keys() ^ expected))
            raise ValueError(f"{wrong} of {name!r} is missing, or not in the recipe")
    return factors, extra


def _check_names(recipe: Collection[str], stored: Collection[str]) -> None:
    for name in [*recipe, *stored]:
        if name not in stored or name not in recipe:
            what = "tensors" if name not in stored else "recipe"
            raise ValueError(f"the {what} of {name!r} are missing")


def _check_layer(name: str, layer: LayerState, r: int, experts: int | None) -> None:
    """Raises unless the tensors have these sizes; `experts` is None for a linear layer."""
    check_pair(name, layer.lora_A, layer.lora_B, experts is not None)
    shapes = {"lora_A": layer.lora_A.shape, "lora_B": layer.lora_B.shape}
    expected: dict[str, tuple[int, ...]]
    first = () if experts is None else (experts,)
    expected = {"lora_A": (*first, r, shapes["lora_A"][-1])}
    expected["lora_B"] = (*first, shapes["lora_B"][-2], r)
    expected |= {"start_A": expected["lora_A"], "start_B": expected["lora_B"]}
    expected |= {"lora_R": (*first, r, r), "lora_diag": (*first, r)}
    expected |= dict.fromkeys(("lora_bias", "lora_magnitude"), (len(layer.lora_B),))
    if layer.lora_magnitude is not None and (experts is not None or layer.lora_bias is not None):
        what = "experts" if experts is not None else "layers with a bias of lora_B"
        raise ValueError(
            f"{name!r} has DoRA's magnitudes (lora_magnitude), which {what} cannot have"
        )
    for key in FACTORS:
        factor = getattr(layer, key)
        if factor is not None:
            if factor.dtype not in FLOATS:
                raise ValueError(f"{key} of {name!r} is {factor.dtype}, not a floating-point type")
            shapes[key] = factor.shape
    for key, shape in shapes.items():
        if tuple(shape) != expected[key]:
            raise ValueError(f"{key} of {name!r} is {list(shape)}, expected {list(expected[key])}")
    if layer.parts:
        try:
            check_parts(layer.parts, layer.lora_B)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from None
