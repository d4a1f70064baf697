"""From an `AdapterState` to the tensors of a file, and back with the help of the recipe."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ..._utils.checks import FLOATS
from ..._utils.peft_names import ADAPTER_CONFIG
from ...layers.state import FACTORS, LayerState
from ...model.config import AdapterState
from .peft_format.reading import (
    DECISIVE,
    check_options,
    check_pair,
    config_from_peft,
    split_tensors,
)
from .portable import trained_factors
from .recipe import PEFT, config_from_dict, layer_from_dict


def check_state(state: AdapterState) -> None:
    """Raises unless the adapter can be written and read again."""
    if not state.layers:
        raise ValueError("the adapter has no layers")
    for name, layer in state.layers.items():
        _check_layer(name, layer, layer.r)
        for key in FACTORS:
            factor = getattr(layer, key)
            if factor is not None and not bool(factor.isfinite().all()):
                raise ValueError(f"{key} of {name!r} holds NaN or Inf; nothing was written")
    for name, tensor in state.extra.items():
        if tensor.dtype in FLOATS and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or Inf; nothing was written")


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raises if a tensor of a file holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS and not bool(tensor.isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or Inf; take an earlier adapter")


def native_tensors(state: AdapterState) -> dict[str, Tensor]:
    """A, B, R and stored initial factors, by this package's names."""
    tensors = {f"extra.{name}": tensor for name, tensor in state.extra.items()}
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
    training: Mapping[str, Tensor],
) -> AdapterState:
    """An adapter that this package wrote.

    Args:
        recipe: that of the file, from `recipe_from_json`.
        config: the content of `adapter_config.json`, if it exists.
        tensors: all tensors of the file.
        training: the tensors of the training file beside it.

    Raises:
        ValueError: they do not fit each other.

    """
    if recipe["format"] == PEFT:
        check_unedited(recipe, config)
        factors, extra = peft_factors(recipe, tensors, training)
    else:
        factors, extra = _split_native(recipe, tensors)
    layers = {}
    for name, layer in recipe["layers"].items():
        try:
            layers[name] = layer_from_dict(layer, factors[name])
        except (ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"the recipe of {name!r} is damaged: {error}") from None
        _check_layer(name, layers[name], layer["r"])
    if recipe["config"] is None:
        values = recipe["peft_config"] | recipe["rank_fields"]
        check_options(values)
        adapted = config_from_peft(values, tuple(layers))
    else:
        adapted = config_from_dict(recipe["config"])
    return AdapterState(adapted, layers, extra, recipe["base_model"])


def check_unedited(recipe: dict[str, Any], config: dict[str, Any] | None) -> None:
    """Raises if `adapter_config.json` does not belong to the tensors. It may be missing: a process
    that writes it last may have been killed.
    """
    if config is None:
        return
    saved = recipe["peft_config"]
    for key in DECISIVE:
        if (config.get(key) or None) != (saved.get(key) or None):  # {} is None
            raise ValueError(
                f"{ADAPTER_CONFIG} says {key} = {config.get(key)!r}, but this was saved with "
                f"{saved.get(key)!r}: it was edited, or belongs to another adapter; to use what "
                f"was saved, remove {ADAPTER_CONFIG}"
            )


def peft_factors(
    recipe: dict[str, Any], tensors: Mapping[str, Tensor], training: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The factors of each layer, without recomputable initial factors, and all other tensors.

    Raises:
        ValueError: the tensors do not fit the recipe.

    """
    if recipe.get("others"):
        raise ValueError(
            f"{', '.join(recipe['others'])}: adapters of an embedding, a convolution or experts "
            "are not implemented here; load it with PEFT"
        )
    by_peft = recipe["config"] is None
    config = recipe["peft_config" if by_peft else "config"]
    saved = config.get("modules_to_save") or ()
    pairs, extra = split_tensors(tensors, saved, recipe["layers"], by_peft)
    _check_names(recipe["layers"], pairs)
    kept, factors = by_layer(training), {}
    for name in recipe["layers"]:
        factors[name] = layer_factors(recipe, name, pairs[name], kept)
    return factors, extra


def layer_factors(
    recipe: dict[str, Any],
    name: str,
    pair: tuple[Tensor, Tensor],
    kept: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """The factors of one layer.

    Args:
        recipe: that of the file.
        name: the layer's.
        pair: lora_A and lora_B of the file.
        kept: the tensors of the training file, from `by_layer`.

    Raises:
        ValueError: the pair does not fit the recipe.

    """
    layer = recipe["layers"][name]
    check_pair(name, *pair)
    split = _doubled_factors if recipe["version"] == 1 else trained_factors
    try:
        return split(layer, *pair) | dict(kept.get(name, {}))
    except ValueError as error:
        raise ValueError(f"{error} ({name})") from None


def _doubled_factors(layer: dict[str, Any], right: Tensor, left: Tensor) -> dict[str, Tensor]:
    """Splits [A; A₀] and [B, −B₀], as version 1 wrote them, into A and B, and A₀ and B₀ if they are
    stored.
    """
    r, start = layer["r"], layer.get("start")
    if right.shape[0] != (2 * r if start else r):
        raise ValueError(f"lora_A has {right.shape[0]} rows, its recipe has r = {r}")
    factors = {"lora_A": right[:r].clone(), "lora_B": left[:, :r].clone()}
    if start == "kept":
        factors |= {"start_A": right[r:].clone(), "start_B": -left[:, r:]}
    return factors


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{layer: {factor: tensor}} of tensors "layers.<layer>.<factor>".

    Raises:
        ValueError: a tensor has another name.

    """
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        layer, _, part = name.rpartition(".")
        if kind != "layers" or part not in (*FACTORS, "lora_bias"):
            raise ValueError(f"{key!r} is not a tensor of an adapter")
        factors.setdefault(layer, {})[part] = tensor
    return factors


def _split_native(
    recipe: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    extra = {k.removeprefix("extra."): t for k, t in tensors.items() if k.startswith("extra.")}
    factors = by_layer({k: t for k, t in tensors.items() if not k.startswith("extra.")})
    _check_names(recipe["layers"], factors)
    for name, layer in recipe["layers"].items():
        expected = {"lora_A", "lora_B"} | ({"lora_R"} if layer.get("R") else set())
        expected |= {"start_A", "start_B"} if layer.get("start") == "kept" else set()
        if factors[name].keys() != expected:
            wrong = ", ".join(sorted(factors[name].keys() ^ expected))
            raise ValueError(f"{wrong} of {name!r} is missing, or not in the recipe")
    return factors, extra


def _check_names(recipe: Collection[str], stored: Collection[str]) -> None:
    for name in [*recipe, *stored]:
        if name not in stored or name not in recipe:
            what = "tensors" if name not in stored else "recipe"
            raise ValueError(f"the {what} of {name!r} are missing")


def _check_layer(name: str, layer: LayerState, r: int) -> None:
    check_pair(name, layer.lora_A, layer.lora_B)
    shapes = {"lora_A": layer.lora_A.shape, "lora_B": layer.lora_B.shape}
    expected = {"lora_A": (r, shapes["lora_A"][1]), "lora_B": (shapes["lora_B"][0], r)}
    for key, like in (("start_A", "lora_A"), ("start_B", "lora_B"), ("lora_R", None)):
        factor = getattr(layer, key)
        if factor is not None:
            if factor.dtype not in FLOATS:
                raise ValueError(f"{key} of {name!r} is {factor.dtype}, not a floating-point type")
            shapes[key], expected[key] = factor.shape, expected[like] if like else (r, r)
    for key, shape in shapes.items():
        if tuple(shape) != expected[key]:
            raise ValueError(f"{key} of {name!r} is {list(shape)}, expected {list(expected[key])}")
