"""Which layers PEFT does not find, or adapts differently, when it loads an adapter's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ...._utils.peft_names import factor_key
from ....layers.kinds import CONVOLUTIONS, ForeignLayer


def lost_in_peft(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """{layer: reason} of the layers that PEFT would not adapt in this model, in whatever way their
    names are written.

    PEFT 0.21 with transformers 5 takes some names for older names of other modules: in a mixture of
    experts "gate_proj" means the experts, even where a dense layer has this name. The result is
    empty if PEFT is not installed or does not rename. `model` may be on the meta device.
    """
    if find_spec("peft") is None or find_spec("transformers") is None or not layers:
        return {}
    if not hasattr(getattr(model, "config", None), "model_type"):  # no model of transformers
        return {}
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return {}
    lost = _retargeted(conversion, model, layers)
    rest = [name for name in layers if name not in lost]
    return lost | _renamed(conversion, model, rest)


def differing_in_peft(
    modules: Mapping[str, nn.Module], layers: Sequence[str]
) -> dict[str, list[str]]:
    """{reason: layers} of the layers for which PEFT computes something other than their weight's
    update: PEFT's convolution with A has the layer's kernel, stride and padding, but no dilation or
    padding mode.
    """
    found: dict[str, list[str]] = {}
    convolutions = {n: modules[n] for n in layers if isinstance(modules.get(n), CONVOLUTIONS)}
    for name, convolution in convolutions.items():
        module: ForeignLayer = convolution
        if any(step != 1 for step in module.dilation):
            found.setdefault("PEFT leaves out the dilation of lora_A", []).append(name)
        elif module.padding_mode != "zeros" and any(module._reversed_padding_repeated_twice):
            found.setdefault("PEFT pads the input of lora_A with zeros", []).append(name)
    return found


def _retargeted(conversion: Any, model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """The layers whose names PEFT turns into names of parameters."""
    reason = "PEFT takes its name for that of the experts and cannot adapt it"
    kept = _kept_targets(conversion, model, layers)
    if kept is None:
        kept = {name for name in layers if _kept_targets(conversion, model, [name])}
    return {name: reason for name in layers if name not in kept}


def _kept_targets(conversion: Any, model: nn.Module, layers: Sequence[str]) -> set[str] | None:
    """The targets that PEFT keeps as names of modules; None if PEFT refuses to convert them,
    because some of the projections that it would join are missing.
    """
    import peft

    config = peft.LoraConfig(target_modules=list(layers))
    try:
        conversion.convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return None
    return set(config.target_modules or ())


def _renamed(conversion: Any, model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """The layers whose tensors PEFT renames while it reads them."""
    import peft

    modules = dict(model.named_modules(remove_duplicate=False))
    keys = {
        factor_key(name, "A", embedding=isinstance(modules.get(name), nn.Embedding)): name
        for name in layers
    }
    tensors = {key: torch.empty(1, 1, device="meta") for key in keys}
    config = peft.LoraConfig(target_modules=list(layers))
    found = conversion.convert_peft_adapter_state_dict_for_transformers(
        model, config, dict(tensors), "default"
    )
    reason = "PEFT gives its tensors another name while it reads them, which is no layer"
    return {name: reason for key, name in keys.items() if key not in found}
