"""Saves adapters of `initialize` in PEFT's folders, and restores them exactly.

A folder holds the adapter in the portable form that `lora_kernels.save_adapter` writes: for the
original base and with s = 1, so that plain PEFT and every server compute W + s·(BA − B₀A₀). The
recipe that restores the trained factors is in the header of the safetensors file, which plain PEFT
and servers do not read. `lora_kernels.load_adapter` reads the folders written here, and the
reverse.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
from peft.utils.warning import PeftWarning
from torch import Tensor

from ..._utils.model_files import read_json
from ..._utils.peft_names import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PREFIX,
    factor_key,
)
from ..._utils.safetensors import load_tensors
from ...files.adapter.content import FolderContent
from ...files.adapter.folder import beyond_vllm
from ...files.adapter.peft_format.writing import exact_targets, portable_fields
from ...files.adapter.portable import within_header
from ...files.adapter.recipe import (
    PEFT,
    recipe_to_json,
)
from ..experts.wrappers import rank_in
from ..layers import adapters_with_start, has_adapter, initialized_adapters, lora_layers
from ..variant import adapters_in, set_start, silently_loaded, start_of
from .portable import LayerFactors, expert_entries, is_whole, layer_factors_of
from .restoring import restored_folder

# The options of the configuration that the portable form changes.
_FIELDS = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
# Attribute of the PeftModel; see `_loaded`.
_LOADED = "_lora_kernels_loaded"


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
    """PEFT's `save_pretrained`, but adapters of `initialize` are written in the portable form.

    Raises:
        ValueError: an adapter of `initialize` would be pickled, or converted, which is unnecessary;
            or `state_dict` lacks it.

    """
    own = type(peft_model).save_pretrained
    names = list(peft_model.peft_config) if selected_adapters is None else selected_adapters
    portable = [name for name in names if name in _portable_adapters(peft_model)]
    if portable and not safe_serialization:
        raise ValueError(
            "safe_serialization=False pickles the adapter, which cannot store the start's recipe"
        )
    if portable and path_initial_model_for_weight_conversion is not None:
        raise ValueError(
            "path_initial_model_for_weight_conversion is not needed: save_pretrained writes "
            "adapters for the original base anyway"
        )
    others = [name for name in names if name not in portable]
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
    state = kwargs.pop("state_dict", None) if portable else None
    for name in portable:
        folder = Path(save_directory) / ("" if name == "default" else name)
        tensors = peft_model.state_dict() if state is None else state
        if is_main_process:  # other processes may have no state, and write nothing
            _check_state(peft_model, name, tensors)
        pairs = list(layer_factors_of(peft_model, name, tensors))
        changed = _portable_state(peft_model, pairs, tensors)
        with TemporaryDirectory() as scratch, _portable_config(peft_model, name, pairs) as fields:
            own(peft_model, scratch, True, [name], state_dict=changed, **common, **kwargs)
            if is_main_process:
                written = Path(scratch) / folder.relative_to(save_directory)
                _publish(written, folder, pairs, tensors, changed, fields)


def load_adapter(
    peft_model: peft.PeftModel,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """PEFT's `load_adapter`. If `save_pretrained` or `lora_kernels.save_adapter` wrote the folder,
    the layers get the A and B that were trained, and the start to subtract. With any other folder,
    the layers whose A and B are loaded subtract nothing.

    Raises:
        ValueError: the file is damaged or has `save_adapter`'s format="native", its recipe has
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
    loaded, starts = _loaded(peft_model) - {adapter_name}, {}
    with TemporaryDirectory() as scratch, silently_loaded():
        restored = restored_folder(peft_model, folder, Path(scratch))
        if restored is None:
            result = own(peft_model, model_id, adapter_name, *args, **kwargs)
        else:
            kwargs.pop("subfolder", None)
            loaded, starts = loaded | {adapter_name}, restored
            result = own(peft_model, scratch, adapter_name, *args, **kwargs)
    setattr(peft_model, _LOADED, loaded)
    # Layers whose A and B were loaded without a start have already dropped their own start.
    for name, layer in lora_layers(peft_model).items():
        if name in starts and has_adapter(layer, adapter_name):
            set_start(layer, adapter_name, *starts[name])
    return result


def _portable_adapters(peft_model: peft.PeftModel) -> set[str]:
    """The adapters to write in the portable form: those of this package."""
    started = initialized_adapters(peft_model) | adapters_with_start(peft_model)
    return started | _loaded(peft_model)


def _loaded(peft_model: peft.PeftModel) -> frozenset[str]:
    """The adapters that were loaded from the portable form."""
    loaded: frozenset[str] = getattr(peft_model, _LOADED, frozenset())
    return loaded


def _keys(name: str, adapter: str, embedding: bool) -> tuple[str, str]:
    """The names of A and B in the model's state_dict."""
    key_A, key_B = (factor_key(name, half, adapter, embedding) for half in "AB")
    return key_A, key_B


def _check_state(peft_model: peft.PeftModel, adapter: str, state: Mapping[str, Tensor]) -> None:
    """Warns, as PEFT does, about factors that are not gathered: they could not be read again.

    Raises:
        ValueError: a factor is missing, or PEFT's hot-swapping changed its rank, which PEFT's
            configuration does not show.

    """
    empty = []
    for name, layer in lora_layers(peft_model).items():
        if not has_adapter(layer, adapter):
            continue
        keys = _keys(name, adapter, adapter in layer.lora_embedding_A)
        started = start_of(layer, adapter) is not None
        if started and (missing := set(keys) - state.keys()):
            raise ValueError(f"state_dict lacks {min(missing)!r}")
        if not all(is_whole(state[key]) for key in keys if key in state):
            empty.append(name)
        elif started and (r := rank_in(layer, state[keys[0]])) != layer.r[adapter]:
            raise ValueError(
                f"lora_A of {name!r} has rank {r}, but {layer.r[adapter]} in the "
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
            stacklevel=5,
        )


def _portable_state(
    peft_model: peft.PeftModel, pairs: list[LayerFactors], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state_dict with A' and s·B' in place of A and B, and without the starts."""
    starts = {
        f"{PREFIX}{name}.{part}.{adapter}"
        for name, layer in lora_layers(peft_model).items()
        for adapter in adapters_in(layer)
        if start_of(layer, adapter) is not None
        for part in ("lora_start_A", "lora_start_B")
    }
    changed = {key: tensor for key, tensor in state.items() if key not in starts}
    r = _rank(pairs)
    for pair in pairs:
        changed |= pair.portable(state, r)
    return changed


def _rank(pairs: list[LayerFactors]) -> int:
    """The rank of the portable form, which must be a multiple of the convolutions' groups."""
    groups = math.lcm(*(pair.parts[1] for pair in pairs))
    r = max((2 * pair.r if pair.start else pair.r for pair in pairs), default=1)
    return -(-r // groups) * groups


@contextmanager
def _portable_config(
    peft_model: peft.PeftModel, adapter: str, pairs: list[LayerFactors]
) -> Iterator[dict[str, Any]]:
    """Sets the adapter's configuration to the portable form inside the `with` block; yields the
    options that change.
    """
    config = peft_model.peft_config[adapter]
    changed = copy.deepcopy(config)
    values = portable_fields(_rank(pairs))
    if isinstance(config.target_modules, str):  # servers refuse regular expressions
        modules = [name.removeprefix(PREFIX) for name, _ in peft_model.named_modules()]
        names = [pair.name for pair in pairs if pair.parts[0] == 1]
        targets, excluded = exact_targets(names, [n for n in modules if ".lora_" not in n])
        values |= {"target_modules": targets, "exclude_modules": excluded}
        values |= {"layers_to_transform": None, "layers_pattern": None}
    for name, value in values.items():
        setattr(changed, name, value)
    fields = {name: getattr(config, name) for name in _FIELDS}
    peft_model.peft_config[adapter] = changed
    try:
        yield {name: list(v) if isinstance(v, set) else v for name, v in fields.items()}
    finally:
        peft_model.peft_config[adapter] = config


def _publish(
    written: Path,
    folder: Path,
    pairs: list[LayerFactors],
    state: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    fields: Mapping[str, Any],
) -> None:
    """Moves what PEFT wrote into the folder and adds the recipe. If the process is killed, the old
    files remain.
    """
    tensors, _ = load_tensors(written / ADAPTER_FILE)
    config = read_json(written / ADAPTER_CONFIG)
    recipes = within_header({pair.recipe_name: pair.recipe(state, changed) for pair in pairs})
    others = {pair.recipe_name for pair in pairs if not pair.linear and pair.parameter is None}
    recipe = recipe_to_json(
        {name: recipes[name] for name in recipes if name not in others},
        PEFT,
        None,
        config.get("base_model_name_or_path"),
        peft_config=config,
        rank_fields=fields,
        others={name: recipes[name] for name in others},
        **expert_entries(pairs, changed),
    )
    content = FolderContent(ADAPTER_FILE, config, tensors, recipe)
    content.write(folder, (ADAPTER_CONFIG, ADAPTER_FILE))
    warning = beyond_vllm(config["r"])
    if warning:
        warnings.warn(warning, stacklevel=5)
