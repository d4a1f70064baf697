"""The LoRA layers of a `PeftModel`, by their names in the base model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import peft
from peft.tuners.lora.layer import (
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from torch import nn

from .._utils.errors import unknown_name
from .._utils.peft_names import PREFIX
from ..layers.base import base_of
from ..layers.kinds import check_adaptable, why_not_embedding
from .experts.wrappers import why_not_experts
from .variant import STARTED, adapters_in, start_of

# Attribute of the PeftModel: how often each adapter was initialized without being undone.
DEPTH = "_lora_kernels_depth"
_DORA = (DoraLinearVariant, DoraEmbeddingVariant)
# PEFT's layers that support a `LoraVariant` although they are not derived from Linear.
_QUANTIZED = ("Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear")


def check_model(peft_model: object) -> None:
    """Raises TypeError unless the model is a `PeftModel` with LoRA adapters only."""
    if not isinstance(peft_model, peft.PeftModel):
        inner = getattr(peft_model, "_orig_mod", None) or getattr(peft_model, "module", None)
        hint = "; it is wrapped: pass the PeftModel inside" if isinstance(inner, nn.Module) else ""
        raise TypeError(
            f"peft_model must be a peft.PeftModel, got {type(peft_model).__name__}{hint}"
        )
    other = {c.peft_type.value for c in peft_model.peft_config.values()} - {"LORA"}
    if other:
        raise TypeError(
            f"peft_model has adapters of type {', '.join(sorted(other))}: only LoRA is supported"
        )


def adapter_of(peft_model: peft.PeftModel, adapter_name: str | None) -> str:
    """The name of an existing adapter; the active one if `adapter_name` is None.

    Raises:
        ValueError: there is no adapter of that name, or it is None and several adapters are active.

    """
    if adapter_name is None:
        active = peft_model.active_adapters
        if len(active) != 1:
            raise ValueError(
                f"{len(active)} adapters are active ({', '.join(active)}): give adapter_name"
            )
        return active[0]
    if adapter_name not in peft_model.peft_config:
        raise unknown_name("adapter_name", adapter_name, list(peft_model.peft_config))
    return adapter_name


def lora_layers(peft_model: nn.Module) -> dict[str, LoraLayer]:
    """All LoRA layers by name, except those inside PEFT's LoRA layer for MultiheadAttention."""
    found: dict[str, LoraLayer] = {}
    inside: tuple[str, ...] = ()
    for name, module in peft_model.named_modules():
        if not isinstance(module, LoraLayer) or (inside and name.startswith(inside)):
            continue
        if isinstance(module, MultiheadAttention):
            inside = (*inside, f"{name}.")
        found[name.removeprefix(PREFIX)] = module
    return found


def original_name(name: str) -> str:
    """The name of a module or parameter without the layers that PEFT puts around it."""
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


def pattern_name(name: str, layer: LoraLayer) -> str:
    """The name with which PEFT compares the keys of `rank_pattern` and `alpha_pattern`, for the
    layer called `name`.

    It is the name in the original model, without the layers that PEFT nests if it adapts several
    parameters of a module. For a parameter it ends with the parameter's name.
    """
    name = original_name(name)
    return f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name


def has_adapter(layer: LoraLayer, adapter: str) -> bool:
    """Whether the layer has this adapter, as a linear layer or as an embedding."""
    return adapter in adapters_in(layer)


def adapters_with_start(model: nn.Module) -> set[str]:
    """The adapters that have initial factors to subtract in at least one layer."""
    return {
        adapter
        for layer in lora_layers(model).values()
        for adapter in adapters_in(layer)
        if start_of(layer, adapter) is not None
    }


def initialized_adapters(model: nn.Module) -> set[str]:
    """The adapters to which `initialize` has given a start that was not undone."""
    depths: Mapping[str, int] = getattr(model, DEPTH, {})
    return {adapter for adapter, depth in depths.items() if depth}


def supports_start(layer: LoraLayer) -> bool:
    """Whether a `LoraVariant` can subtract A₀ and B₀ in PEFT's forward of this layer, or the layer
    is one of experts, whose methods for the update can be replaced.
    """
    kind = type(layer)
    if kind is ParamWrapper:
        return why_not_experts(layer) is None
    return kind.__name__ in _QUANTIZED or (
        isinstance(layer, (Linear, Embedding))
        and kind.forward in (Linear.forward, Embedding.forward)
    )


def why_not_startable(layer: LoraLayer, adapter: str) -> str | None:
    """Why `initialize` cannot initialize this layer's adapter; None if it can."""
    if type(layer) is ParamWrapper:
        return why_not_experts(layer)
    if not supports_start(layer):
        return f"PEFT's {type(layer).__name__} is no linear layer known to lora_kernels"
    variant = layer.lora_variant.get(adapter)
    if variant is not None and not isinstance(variant, (*STARTED, *_DORA)):
        return f"it is PEFT's {type(variant).__name__}, not plain LoRA"
    return _why_not_base(layer.get_base_layer())


def _why_not_base(base: nn.Module) -> str | None:
    """Why the base layer is not x Wᵀ + b with its weight W; None if it is."""
    if base_of(base) is not None:
        return None
    if isinstance(base, nn.Embedding):
        return f"its base: {why_not_embedding(base)}"
    if isinstance(base, nn.Linear):
        try:
            check_adaptable(base)
        except TypeError as error:
            return f"its base: {error}"
    return f"its base, {type(base).__name__}, is no linear layer known to lora_kernels"


def described(left: Mapping[str, str], names: int = 3) -> list[str]:
    """One line for each reason in `left`, {name: reason}, with the first `names` layers."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    return [
        f"  skipped {len(found)}: {reason} ({', '.join(found[:names])}"
        f"{' ...' if len(found) > names else ''})"
        for reason, found in reasons.items()
    ]
