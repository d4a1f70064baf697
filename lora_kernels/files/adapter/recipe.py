"""An adapter's recipe: its configuration and a few numbers per layer, as JSON.

The recipe is in the header of the file that holds the tensors, so that both are replaced in one
step. `save_adapter` and `lora_kernels.peft` write the same recipe into PEFT's files, and each can
read the files of the other.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from ..._utils.safetensors import DTYPES, read_layout
from ...init import Initializer, get_initializer, initializer_names
from ...init.fused import checked_ranges
from ...layers.state import FACTORS, LayerState
from ...model.config import ExpertPart, LoRAConfig, StoredExperts
from ...ops.linear.factors import widest
from ..io.differences import changed

METADATA = "lora_kernels"  # the recipe's key in the header
VERSION = 2
# In version 1, the format "peft" holds [A; A₀] and [B, −B₀], and the configuration has s and ranks.
_VERSIONS = (1, VERSION)
# Formats of a folder. START is the format of the start beside a residual base, from which it was
# subtracted (see lora_kernels.files.checkpoint.residual).
PEFT, NATIVE, START = "peft", "native", "start"
DIFFUSERS = "diffusers"  # the content of PEFT, in one file
FORMATS = (PEFT, NATIVE, DIFFUSERS)
# Entries in the recipe of an adapter of experts: what files store for the experts, and which
# tensors of this file (format "peft") hold them.
EXPERTS, TENSORS = "experts", "expert_tensors"
_DTYPES = {str(d).removeprefix("torch."): d for d in DTYPES.values()}
_NUMBERS = ("scaling", "lora_alpha", "beta", "weight_norm")
_OF_EACH_EXPERT = ("beta", "weight_norm")


def recipe_to_json(
    layers: Mapping[str, dict[str, Any]],
    file_format: str,
    config: LoRAConfig | None,
    base_model: str | None,
    **more: Any,
) -> str:
    """The recipe of an adapter that is stored as `file_format`, from the recipes of its layers.

    `more` depends on the format. "peft" has `peft_config`, the content of `adapter_config.json`,
    and `rank_fields`, its fields at the rank that is trained; for a PEFT model also `others`, the
    layers that are not linear. "start" has `original`, the original base. An adapter of a PEFT
    model has no `config`.
    """
    recipe = {
        "version": VERSION,
        "format": file_format,
        "base_model": base_model,
        "config": None if config is None else config_to_dict(config),
        "layers": dict(layers),
        **more,
    }
    return json.dumps(recipe, allow_nan=False)


def recipe_from_json(text: str) -> dict[str, Any]:
    """Parses a recipe.

    Raises:
        ValueError: the recipe is damaged or has another version.

    """
    try:
        recipe = json.loads(text)
        version = recipe["version"]
        if version not in _VERSIONS:
            raise ValueError(
                f"its recipe is of version {version!r}, this package reads up to version "
                f"{VERSION}: update lora_kernels"
            )
        parts = ["config", "layers"]
        if recipe["format"] == PEFT:
            parts += ["peft_config", "rank_fields"]
            if recipe["config"] is None:
                parts.remove("config")
        if not all(isinstance(recipe[key], dict) for key in parts):
            raise TypeError
        if not recipe["layers"] or not all(
            type(layer["r"]) is int for layer in recipe["layers"].values()
        ):
            raise TypeError
        recipe["base_model"]
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError):
        raise ValueError("its recipe is damaged") from None
    return recipe


def read_recipe(file: Path) -> dict[str, Any] | None:
    """The recipe in a file; None if the file does not exist, or has no recipe.

    Raises:
        ValueError: the file or its recipe is damaged.

    """
    text = read_layout(file).metadata.get(METADATA) if file.is_file() else None
    try:
        return None if text is None else recipe_from_json(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def trained_dtype(recipe: Mapping[str, Any], factor: str) -> torch.dtype | None:
    """The dtype in which a layer's factor was trained if the file has another dtype; else None."""
    return _DTYPES.get(recipe.get("dtypes", {}).get(factor))


def layer_numbers(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers in a layer's recipe.

    Raises:
        ValueError: a number or another value that a layer needs is missing or wrong.

    """
    numbers: dict[str, Any] = {}
    experts = recipe.get("experts")
    if experts is not None and (type(experts) is not int or experts < 1):
        raise ValueError(f"experts is {experts!r}, not a positive whole number")
    for key in _NUMBERS:
        value = recipe.get(key)
        if value is not None and experts is not None and key in _OF_EACH_EXPERT:
            value = _list_of_numbers(key, value, experts)
        elif value is not None and not _is_number(value):
            raise ValueError(f"{key} is {value!r}, not a number")
        numbers[key] = value
    for key in ("scaling", "lora_alpha"):
        if numbers[key] is None or not 0 < numbers[key] < math.inf:
            raise ValueError(f"{key} is {numbers[key]!r}, not a positive number")
    if type(recipe.get("r")) is not int or recipe["r"] < 1:
        raise ValueError(f"r is {recipe.get('r')!r}, not a positive whole number")
    if recipe.get("residual") not in ("absorb", "implicit"):
        raise ValueError(f"residual is {recipe.get('residual')!r}")
    if recipe.get("trains", "AB") not in ("AB", "A"):
        raise ValueError(f"trains is {recipe['trains']!r}")
    if recipe.get("start") not in (None, "dst", "kept"):
        raise ValueError(f"start is {recipe['start']!r}")
    if (recipe.get("start") == "dst") != (numbers["beta"] is not None):
        raise ValueError(f"beta is {numbers['beta']!r}, for the start {recipe.get('start')!r}")
    return numbers


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _list_of_numbers(key: str, values: Any, experts: int) -> torch.Tensor:
    """The numbers of all experts, as float64 [E]."""
    if not isinstance(values, list) or not all(map(_is_number, values)):
        raise ValueError(f"{key} is {values!r}, not a list of numbers")
    if len(values) != experts:
        raise ValueError(f"{key} has {len(values)} numbers for {experts} experts")
    return torch.tensor(values, dtype=torch.float64)


def layer_from_dict(recipe: dict[str, Any], factors: dict[str, torch.Tensor]) -> LayerState:
    """The layer with these factors, in the dtypes and to the bits with which they were trained.

    Raises:
        ValueError: a number is missing or wrong.

    """
    numbers = layer_numbers(recipe)
    for key, dtype in recipe.get("dtypes", {}).items():
        if key in factors:
            factors[key] = factors[key].to(_DTYPES[dtype])
    for key, text in recipe.get("bits", {}).items():
        factors[key] = changed(factors[key], text)
    return LayerState(
        lora_A=factors["lora_A"],
        lora_B=factors["lora_B"],
        scaling=numbers["scaling"],
        lora_alpha=numbers["lora_alpha"],
        lora_R=factors.get("lora_R"),
        beta=numbers["beta"],
        start_A=factors.get("start_A"),
        start_B=factors.get("start_B"),
        residual=recipe["residual"],
        weight_norm=numbers["weight_norm"],
        lora_bias=factors.get("lora_bias"),
        embedding=bool(recipe.get("embedding")),
        kernel=tuple(recipe.get("kernel", ())),
        groups=recipe.get("groups", 1),
        lora_magnitude=factors.get("lora_magnitude"),
        lora_diag=factors.get("lora_diag"),
        trains=recipe.get("trains", "AB"),
        parts=checked_ranges(recipe.get("parts", ()), "parts"),
    )


def config_to_dict(config: LoRAConfig) -> dict[str, Any]:
    """All fields, as JSON values."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    values["init_lora_weights"] = _initializer_to_json(config.init_lora_weights)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def config_from_dict(values: dict[str, Any]) -> LoRAConfig:
    """The inverse of `config_to_dict`.

    Raises:
        ValueError: a field is unknown or has a wrong value.

    """
    try:
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        values["init_lora_weights"] = _initializer_from_json(values["init_lora_weights"])
        return LoRAConfig(**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its configuration is damaged: {error}") from None


def parts_to_json(parts: Mapping[str, tuple[ExpertPart, ...]]) -> dict[str, Any]:
    """{layer: [[name, start, stop], ...]} for experts."""
    return {name: [[p.name, p.start, p.stop] for p in own] for name, own in parts.items()}


def parts_from_json(values: Any) -> dict[str, tuple[ExpertPart, ...]]:
    """The inverse of `parts_to_json`.

    Raises:
        ValueError: the value is damaged.

    """
    try:
        found = {k: tuple(ExpertPart(*part) for part in own) for k, own in values.items()}
        valid = all(
            isinstance(p.name, str) and type(p.start) is type(p.stop) is int
            for own in found.values()
            for p in own
        )
    except (AttributeError, TypeError):
        valid = False
    if not valid:
        raise ValueError("the names of its experts' tensors are damaged")
    return found


def experts_to_json(experts: Mapping[str, StoredExperts]) -> dict[str, Any]:
    """The content of the `StoredExperts` of each parameter of experts."""
    parts = parts_to_json({name: stored.parts for name, stored in experts.items()})
    return {name: [stored.layout, parts[name]] for name, stored in experts.items()}


def experts_from_json(values: Any) -> dict[str, StoredExperts]:
    """The inverse of `experts_to_json`.

    Raises:
        ValueError: the value is damaged.

    """
    try:
        layouts = {name: layout for name, (layout, _) in values.items()}
        parts = parts_from_json({name: own for name, (_, own) in values.items()})
    except (AttributeError, TypeError):
        raise ValueError("what it says of experts is damaged") from None
    return {name: StoredExperts(parts[name], str(layouts[name])) for name in parts}


def layer_to_dict(layer: LayerState) -> dict[str, Any]:
    """The layer's recipe; the inverse of `layer_from_dict`."""
    recipe = {key: _as_json(getattr(layer, key)) for key in _NUMBERS} | {
        "r": layer.r,
        **({} if layer.experts is None else {"experts": layer.experts}),
        "residual": layer.residual,
        "start": "dst" if layer.beta is not None else "kept" if layer.changes_base else None,
        "R": layer.lora_R is not None,
        **({} if layer.lora_bias is None else {"bias": True}),
        **({"embedding": True} if layer.embedding else {}),
        **({"kernel": list(layer.kernel)} if layer.kernel else {}),
        **({"groups": layer.groups} if layer.groups != 1 else {}),
        **({} if layer.lora_magnitude is None else {"magnitude": True}),
        **({} if layer.lora_diag is None else {"diag": True}),
        **({} if layer.trains == "AB" else {"trains": layer.trains}),
        **({"parts": [list(part) for part in layer.parts]} if layer.parts else {}),
    }
    factors = {key: factor for key in FACTORS if (factor := getattr(layer, key)) is not None}
    work = widest(*factors.values())
    dtypes = {
        key: str(factor.dtype).removeprefix("torch.")
        for key, factor in factors.items()
        if factor.dtype != work
    }
    return recipe | ({"dtypes": dtypes} if dtypes else {})


def _as_json(number: float | torch.Tensor | None) -> Any:
    """The number, or the list of the experts' numbers."""
    return number.tolist() if isinstance(number, torch.Tensor) else number


def _initializer_to_json(value: Any) -> Any:
    """A name, or {"name", "options"} of an object; options are None if they do not fit in JSON."""
    if not isinstance(value, Initializer):
        return value
    options: dict[str, Any] | None = None
    if is_dataclass(value):
        known = [f.name for f in fields(value) if f.init]
        options = {name: _initializer_to_json(getattr(value, name)) for name in known}
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError):
        options = None
    names = [n for n in initializer_names() if type(get_initializer(n)) is type(value)]
    return {"name": names[0] if names else type(value).__name__, "options": options}


def _initializer_from_json(value: Any) -> Any:
    name = value["name"] if isinstance(value, dict) else value
    if isinstance(name, bool):
        return name
    try:
        initializer = get_initializer(name)
        if name is value:
            return name
        options = value["options"]
        return type(initializer)(
            **{
                key: _initializer_from_json(v) if isinstance(v, dict) else v
                for key, v in options.items()
            }
        )
    except (ValueError, TypeError, AttributeError):
        # The initial factors are in the file. The initializer is needed only for new layers.
        warnings.warn(
            f"the adapter was started with {name!r}, which is not registered here or had other "
            "options (lora_kernels.init.register_initializer): its configuration says 'lora' "
            "instead; the adapter computes the same",
            stacklevel=2,
        )
        return "lora"
