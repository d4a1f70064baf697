"""PEFT's `ensure_weight_tying`: modules with the input embedding's weight are adapted together."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..._utils.names import ALL_LINEAR
from ..._utils.peft_names import TIE
from ...init.sharded.layout import is_sharded
from ...layers.adapted import AdaptedLayer
from ...layers.adapter import Adapter
from ...layers.linear.embedding import LoRAEmbedding
from ...layers.linear.tied import TiedAdapter
from ..config import LoRAConfig
from .layers import input_embeddings

_TOLERANCE = 1e-3  # between updates whose factors were rounded separately


def tied_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have the input embedding's weight, by name, the embedding first; {} if it is
    the only one.
    """
    embedding = input_embeddings(model)
    if embedding is None:
        return {}
    weight = embedding._parameters.get("weight")
    found = {
        name: module
        for name, module in model.named_modules()
        if weight is not None and module._parameters.get("weight") is weight
    }
    first = sorted(found.items(), key=lambda item: item[1] is not embedding)
    return dict(first) if len(found) > 1 else {}


def with_ties(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The configuration. If `ensure_weight_tying` is set and it names one tied module, the result
    names all of them, in `modules_to_save` or, if not there, in `target_modules`. As in PEFT, a
    warning says if there is nothing to tie.

    Raises:
        ValueError: adapters of the tied modules cannot be tied.

    """
    if not config.ensure_weight_tying:
        return config
    tied = tied_modules(model)
    if not tied:
        warnings.warn(
            f"{TIE}: the model has no module that is tied to its input embedding", stacklevel=3
        )
        return config
    saved = with_saved_ties(model, config)
    if any(_is_named(name, saved.modules_to_save or ()) for name in tied):
        return saved
    targets = config.target_modules or ()
    if targets == ALL_LINEAR or not any(_is_named(name, targets) for name in tied):
        warnings.warn(
            f"{TIE}: neither target_modules nor modules_to_save names a tied module", stacklevel=3
        )
        return config
    _check_tying(config, tied)
    added = [name for name in tied if not _is_named(name, targets)]
    if isinstance(targets, str):
        targets = "|".join([f"(?:{targets})", *map(re.escape, added)])
        return replace(config, target_modules=targets)
    return replace(config, target_modules=(*targets, *added))


def with_saved_ties(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The configuration. If `ensure_weight_tying` is set and `modules_to_save` names one tied
    module, the result names all of them there.
    """
    saved = config.modules_to_save or ()
    tied = tied_modules(model) if config.ensure_weight_tying else {}
    if not any(_is_named(name, saved) for name in tied):
        return config
    added = [name for name in tied if not _is_named(name, saved)]
    return replace(config, modules_to_save=(*saved, *added))


def _check_tying(config: LoRAConfig, tied: Mapping[str, nn.Module]) -> None:
    """Raises ValueError if the adapters of these modules cannot be one."""
    if config.use_dora:
        raise ValueError(
            f"{TIE} cannot tie adapters with use_dora=True: the magnitudes are norms of W's rows "
            "in one layer and of its columns in the other"
        )
    excluded = [name for name in tied if _is_named(name, config.exclude_modules or ())]
    if excluded:
        raise ValueError(
            f"exclude_modules leaves out {excluded[0]}, which {TIE}=True adapts with "
            f"{', '.join(name for name in tied if name not in excluded)}"
        )
    weight = next(iter(tied.values())).weight
    if isinstance(weight, Tensor) and (weight.is_meta or is_sharded(weight)):
        raise ValueError(
            f"{TIE} cannot tie adapters of weights that are sharded or not loaded: add the adapter "
            "before that, or once they are loaded"
        )


def tie_adapters(
    model: nn.Module, config: LoRAConfig, adapter_name: str, loaded: bool = False
) -> None:
    """If `ensure_weight_tying` is set, replaces the installed adapters of the tied modules by that
    of the input embedding. Adapters that were `loaded` and differ stay separate, with a warning.
    """
    tied = tied_modules(model) if config.ensure_weight_tying else {}
    layers = _with_adapter(tied, adapter_name)
    if list(layers)[:1] != list(tied)[:1]:
        return  # the embedding is not adapted
    for name, layer in list(layers.items())[1:]:
        source = next(iter(layers.values())).adapter(adapter_name)
        transposed = not isinstance(layer, LoRAEmbedding)
        if loaded and _differ(layer.adapter(adapter_name), source, transposed):
            warnings.warn(
                f"{TIE}: the adapters of {next(iter(layers))} and {name} differ, and stay apart",
                stacklevel=5,
            )
            continue
        layer.adapters[adapter_name] = TiedAdapter(source) if transposed else source
        layer.active_adapter = layer.active_adapter  # points to the new module


def tied_layers(model: nn.Module, adapter_name: str) -> list[str]:
    """The names of the layers whose adapters are tied, the embedding first; [] if none are."""
    layers = _with_adapter(tied_modules(model), adapter_name)
    sources = {name: layer.adapter(adapter_name) for name, layer in layers.items()}
    sources = {name: getattr(own, "source", own) for name, own in sources.items()}
    first = next(iter(sources.values()), None)
    same = [name for name, source in sources.items() if source is first]
    return same if len(same) > 1 else []


def tie_weights(model: nn.Module, names: Sequence[str]) -> None:
    """Gives modules that were merged one by one the weight of the first one."""
    for name in names[1:]:
        model.get_submodule(name).weight = model.get_submodule(names[0]).weight


def _with_adapter(tied: Mapping[str, nn.Module], adapter_name: str) -> dict[str, AdaptedLayer]:
    return {
        name: module
        for name, module in tied.items()
        if isinstance(module, AdaptedLayer) and adapter_name in module.adapters
    }


def _differ(own: Adapter, source: Adapter, transposed: bool) -> bool:
    """Whether the update of an adapter differs from that of the embedding's adapter."""
    if own.lora_bias is not None or own.lora_magnitude is not None:
        return True
    right, left = (factor.double() for factor in own.layer_state().update_factors())
    other_right, other_left = (f.double() for f in source.layer_state().update_factors())
    if transposed:
        other_right, other_left = other_left.mT, other_right.mT
    rights = torch.cat([right, other_right])  # [k, in]
    lefts = torch.cat([own.scaling * left, -source.scaling * other_left], 1)  # [out, k]
    products, k = (lefts.mT @ lefts) * (rights @ rights.mT), len(right)
    return bool(products.sum() > _TOLERANCE**2 * products[:k, :k].sum())


def _is_named(name: str, option: str | Collection[str]) -> bool:
    """Whether an option (a regular expression, or names and endings) matches this module."""
    if isinstance(option, str):
        return re.fullmatch(option, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in option)
