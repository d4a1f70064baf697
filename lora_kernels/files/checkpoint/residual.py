"""The start that belongs to a residual base, and adapters trained from that start.

`initialize` writes such a start beside the residual base. PEFT writes one if an adapter of "pissa",
"olora", "corda" or "lora_ga" is saved before training. The start and the trained adapter are PEFT
adapters of the residual base and wrong on the original base, but together they give an adapter of
the original base.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..._utils.model_files import read_json
from ..._utils.peft_names import ADAPTER_CONFIG, ADAPTER_FILE, base_changing_start
from ..._utils.safetensors import load_tensors
from ...init.base import initializer_names
from ...layers.state import LayerState
from ...model.config import AdapterState, repeated_blocks
from ..adapter.folder import read_adapter
from ..adapter.peft_format.experts.layouts import unstacked
from ..adapter.peft_format.experts.writing import wrappers
from ..adapter.peft_format.reading import split_tensors
from ..adapter.recipe import START, config_from_dict, layer_from_dict, read_recipe

ADAPTER = "adapter"  # the name of the start's folder inside the residual base's folder
_GIVE = "give the adapter as it was saved before training as the start (--start)"


def is_start(folder: Path) -> bool:
    """Whether the folder holds such a start."""
    return _recipe_of(folder) is not None


def read_start(folder: Path) -> AdapterState:
    """The start as an adapter of the original base; A and B are the factors that were subtracted.

    Raises:
        ValueError: the folder does not hold a start, or is damaged.

    """
    if not (folder / ADAPTER_FILE).is_file() or read_recipe(folder / ADAPTER_FILE) is None:
        return _start_by_peft(folder)
    recipe = _recipe_of(folder)
    if recipe is None:
        raise _no_start(folder)
    saved = recipe["config"].get("modules_to_save") or ()
    tensors, _ = load_tensors(folder / ADAPTER_FILE)
    pairs, extra = split_tensors(tensors, saved, by_peft=False)
    experts = wrappers([name for name, values in recipe["layers"].items() if "experts" in values])
    layers = {}
    for name, values in recipe["layers"].items():
        if experts.get(name, name) not in pairs:
            raise ValueError(f"{folder / ADAPTER_FILE} lacks {name!r}, which is in its recipe")
        A, B = pairs[experts.get(name, name)]
        if name in experts:
            A, B = unstacked(A, B, values["experts"])
        factors = {"lora_A": A, "lora_B": B}
        if values.get("start") == "kept":
            factors |= {"start_A": A, "start_B": B}
        layers[name] = layer_from_dict(values, factors)
    config = config_from_dict(recipe["config"])
    return AdapterState(config, layers, extra, recipe.get("original"))


def _start_by_peft(folder: Path) -> AdapterState:
    """`read_start` of an adapter that PEFT saved before training.

    PEFT's guides set `init_lora_weights` to true before saving. B then shows whether a start was
    subtracted: if not, B is zero.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        raise _no_start(folder)
    state = read_adapter(folder, residual_base=True)
    refuse_residual(folder, state)
    method = _method(folder)
    layers = state.layers.values()
    if method == "loftq" or any(layer.changes_base for layer in layers):
        raise _no_start(folder, "PEFT has made a new base for it" if method == "loftq" else "")
    if not any(bool(layer.lora_B.any()) for layer in layers):
        raise _no_start(folder, "B = 0, so that nothing was subtracted from the base")
    known = method if method in initializer_names() else None
    config = replace(state.config, init_lora_weights=known or "lora")
    started = {
        name: replace(layer, start_A=layer.lora_A, start_B=layer.lora_B)
        for name, layer in state.layers.items()
    }
    return AdapterState(config, started, {}, state.base_model)


def _method(folder: Path) -> str | None:
    """The start by which PEFT has changed the base ("pissa" for "pissa_niter_4"); None if the
    configuration names none.
    """
    file = folder / ADAPTER_CONFIG
    values = read_json(file) if file.is_file() else {}
    return base_changing_start(values.get("init_lora_weights"))


def _no_start(folder: Path, why: str = "") -> ValueError:
    return ValueError(
        f"{folder} is not a start{why and ': '}{why}. Give the folder {ADAPTER!r} of a model that "
        "lora-kernels init wrote, or an adapter that PEFT saved before training, with "
        "init_lora_weights 'pissa', 'olora', 'corda' or 'lora_ga'"
    )


def without_start(state: AdapterState, trained: Path, start: Path) -> AdapterState:
    """Converts the adapter in the folder `trained` from the residual base to the original base,
    with the help of the start in the folder `start`.

    Warns if neither configuration says that PEFT subtracted a start: PEFT's guides set
    `init_lora_weights` to true before saving, so that the files of many starts do not say it.

    Raises:
        ValueError: `start` is no start, or the adapter was not trained from it.

    """
    if start.exists() and start.samefile(trained):
        raise ValueError(
            f"{start} is the trained adapter itself, from which nothing would be left: {_GIVE}"
        )
    first = read_start(start)
    method = None if is_start(start) else _common_method(start, trained)
    if method is not None and not _orthogonal(first.layers.values()):
        raise _no_start(
            start,
            f"the columns of lora_B are not orthogonal, as those that PEFT makes by {method!r} are "
            "before they are trained",
        )
    converted = trained_from(first, state)
    if method is None and not is_start(start):
        warnings.warn(
            f"nothing in {start} or {trained} says that {start} was subtracted from the weights of "
            "a base: neither names a start as PEFT's 'pissa', 'olora', 'corda' or 'lora_ga' in "
            "init_lora_weights. The result is right if it was set to true before saving, as in "
            "PEFT's guides; it is wrong if this is ordinary LoRA or another training run",
            stacklevel=3,
        )
    return converted


def _common_method(start: Path, trained: Path) -> str | None:
    """PEFT's start that either folder names; raises ValueError if they name different ones."""
    first, then = _method(start), _method(trained)
    if first is not None and then is not None and first != then:
        raise ValueError(
            f"{trained} was trained from init_lora_weights = {then!r}, {start} is a start of "
            f"{first!r}"
        )
    return first or then


def _orthogonal(layers: Iterable[LayerState]) -> bool:
    """Whether the columns of B are orthogonal in every layer, up to a rounding to 16 bits.

    PEFT computes B from singular vectors or a QR decomposition. The cosines of random columns of n
    numbers have a spread of 1 / sqrt(n); if orthogonal columns are rounded to bfloat16, the spread
    is 1/500 of that.
    """
    for layer in layers:
        B = layer.lora_B.detach().double()  # for experts, their number is the first dimension
        B = B / B.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(B.dtype).tiny)
        cosines = (B.mT @ B).triu(1)
        pairs = max(1, B.shape[-1] * (B.shape[-1] - 1) // 2) * (layer.experts or 1)
        if cosines.square().sum() / pairs > 0.05**2 / B.shape[-2]:
            return False
    return True


def trained_from(start: AdapterState, trained: AdapterState) -> AdapterState:
    """Converts an adapter of the residual base to an adapter of the original base.

    Raises:
        ValueError: the adapter was not trained from this start.

    """
    if start.config.initializer.rewrites_base:
        raise ValueError(
            f"{start.config.init_lora_weights!r} has made a new base instead of subtracting the "
            "start: adapters that are trained on that base belong to it as they are"
        )
    blocks = repeated_blocks(trained.replication)
    if len(set(blocks)) < len(blocks):
        raise ValueError(
            f"layer_replication = {list(map(list, trained.replication))} repeats blocks: the "
            "starts of all copies were subtracted from the weights that they share, and no adapter "
            "of the original base gives that back"
        )
    layers = dict(trained.layers)
    trained_anew = False
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
            # PEFT computes s from a lora_alpha that was itself computed from s.
            if not math.isclose(getattr(layer, what), getattr(first, what), rel_tol=1e-12):
                raise ValueError(
                    f"{name!r} has {what} = {getattr(layer, what):g}, its start "
                    f"{getattr(first, what):g}: it was not trained from this start"
                )
        if layer.lora_A.shape != first.lora_A.shape or layer.lora_B.shape != first.lora_B.shape:
            raise ValueError(f"{name!r} and its start have different shapes")
        trained_anew |= not _equal(first, layer)
        layers[name] = replace(
            layer,
            beta=first.beta,
            start_A=first.start_A,
            start_B=first.start_B,
            residual=first.residual,
            weight_norm=first.weight_norm,
        )
    if not trained_anew:
        raise ValueError(
            "the adapter and its start have the same factors in every layer, from which nothing "
            "would be left: it was not trained, or the start is a copy of the trained adapter; "
            f"{_GIVE}"
        )
    config = replace(
        trained.config,
        init_lora_weights=start.config.init_lora_weights,
        residual=start.config.residual,
    )
    return replace(trained, config=config, layers=layers, base_model=start.base_model)


def _equal(start: LayerState, trained: LayerState) -> bool:
    """Whether A and B are equal, or would be if both were rounded to the narrower dtype."""
    pairs = ((start.lora_A, trained.lora_A), (start.lora_B, trained.lora_B))
    return all(_same(one, other) for one, other in pairs)


def _same(one: Tensor, other: Tensor) -> bool:
    dtype = min(one.dtype, other.dtype, key=lambda kind: kind.itemsize)
    return torch.equal(one.to(dtype), other.to(dtype))


def refuse_residual(adapter: Path, state: AdapterState, base: Path | None = None) -> None:
    """Raises ValueError if the adapter was trained on a residual base other than `base`."""
    if state.base_model is None or any(layer.changes_base for layer in state.layers.values()):
        return
    trained_on = find_base(state.base_model, adapter)
    if trained_on is None or not is_start(trained_on / ADAPTER):
        return
    if base is None or not trained_on.samefile(base):
        raise ValueError(
            f"{adapter} was trained on {trained_on}, from whose weights a start was subtracted, "
            f"and is wrong on another model: convert it with --start {trained_on / ADAPTER}"
        )


def find_base(name: str, adapter: Path) -> Path | None:
    """The folder of the model that an adapter was trained on; None if it is not on this machine.
    The name is resolved as it is, or relative to the adapter's folder or one of its parents: the
    training may have had another working directory.
    """
    folder = adapter.absolute()
    places = (Path(name), *(parent / name for parent in (folder, *folder.parents)))
    return next((place for place in places if name and place.is_dir()), None)


def _recipe_of(folder: Path) -> dict[str, Any] | None:
    """The recipe of a start, or None."""
    recipe = read_recipe(folder / ADAPTER_FILE)
    return recipe if recipe is not None and recipe["format"] == START else None
