"""The start that `initialize` writes beside a residual base, and adapters trained from it.

Both are PEFT adapters of the residual base, and wrong on the original one. Together they are an
adapter of the original base.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..._utils.peft_names import ADAPTER_FILE
from ..._utils.safetensors import load_tensors
from ...model.config import AdapterState
from ..adapter.peft_format.reading import split_tensors
from ..adapter.recipe import START, config_from_dict, layer_from_dict, read_recipe

ADAPTER = "adapter"  # the name of its folder, in that of the residual base


def is_start(folder: Path) -> bool:
    """Whether the folder holds such a start."""
    return _recipe_of(folder) is not None


def read_start(folder: Path) -> AdapterState:
    """The start as an adapter of the original base: A and B are the factors that were subtracted.

    Raises:
        ValueError: the folder does not hold a start, or is damaged.

    """
    recipe = _recipe_of(folder)
    if recipe is None:
        raise ValueError(
            f"{folder} is not a start of lora-kernels init: give the folder {ADAPTER!r} of a model "
            "that it wrote"
        )
    saved = recipe["config"].get("modules_to_save") or ()
    tensors, _ = load_tensors(folder / ADAPTER_FILE)
    pairs, extra = split_tensors(tensors, saved, by_peft=False)
    layers = {}
    for name, values in recipe["layers"].items():
        if name not in pairs:
            raise ValueError(f"{folder / ADAPTER_FILE} lacks {name!r}, which is in its recipe")
        A, B = pairs[name]
        factors = {"lora_A": A, "lora_B": B}
        if values.get("start") == "kept":
            factors |= {"start_A": A, "start_B": B}
        layers[name] = layer_from_dict(values, factors)
    config = config_from_dict(recipe["config"])
    return AdapterState(config, layers, extra, recipe.get("original"))


def trained_from(start: AdapterState, trained: AdapterState) -> AdapterState:
    """Converts an adapter of the residual base to one of the original base.

    Raises:
        ValueError: the adapter was not trained from this start.

    """
    if start.config.initializer.rewrites_base:
        raise ValueError(
            f"{start.config.init_lora_weights!r} has made a new base, which is not the original "
            "minus the start: adapters that are trained on it belong to it as they are"
        )
    layers = dict(trained.layers)
    for name, first in start.layers.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(
                f"the trained adapter lacks {name!r}, which has a start: it was not trained from "
                "this start"
            )
        if layer.changes_base:
            raise ValueError(
                f"{name!r} belongs to an adapter of the original base already: --start is for "
                "adapters that PEFT trained on the residual base"
            )
        for what in ("r", "scaling"):
            # PEFT computes s from a lora_alpha that was computed from s.
            if not math.isclose(getattr(layer, what), getattr(first, what), rel_tol=1e-12):
                raise ValueError(
                    f"{name!r} has {what} = {getattr(layer, what):g}, its start "
                    f"{getattr(first, what):g}: it was not trained from this start"
                )
        if layer.lora_A.shape != first.lora_A.shape or layer.lora_B.shape != first.lora_B.shape:
            raise ValueError(f"{name!r} and its start have different shapes")
        layers[name] = replace(first, lora_A=layer.lora_A, lora_B=layer.lora_B)
    config = replace(
        trained.config,
        init_lora_weights=start.config.init_lora_weights,
        residual=start.config.residual,
    )
    return AdapterState(config, layers, trained.extra, start.base_model)


def refuse_residual(adapter: Path, state: AdapterState, base: Path | None = None) -> None:
    """Raises if the adapter was trained on a residual base other than `base`."""
    if state.base_model is None or any(layer.changes_base for layer in state.layers.values()):
        return
    trained_on = Path(state.base_model)
    if is_start(trained_on / ADAPTER) and (base is None or not trained_on.samefile(base)):
        raise ValueError(
            f"{adapter} was trained on {trained_on}, from whose weights a start was subtracted, "
            f"and is wrong on another model: convert it with --start {trained_on / ADAPTER}"
        )


def _recipe_of(folder: Path) -> dict[str, Any] | None:
    """The recipe of a start, or None."""
    recipe = read_recipe(folder / ADAPTER_FILE)
    return recipe if recipe is not None and recipe["format"] == START else None
