"""The fused forward of experts whose parameters PEFT adapts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ...model.experts.forward import Factors, experts_forward
from ...model.experts.kinds import ForeignExperts, projections
from ..patch import is_plain, is_replaced
from ..variant import StartVariant, start_of
from .wrappers import chain_of, stacks, why_not_experts


def fused_experts(wrapper: ParamWrapper, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y [T, H] of x [T, H], `top_k_index` [T, k] and `top_k_weights` [T, k].

    It replaces PEFT's forward of an outermost `ParamWrapper` over experts, and calls it if it
    cannot fuse.
    """
    factors = None
    if len(args) == 2 and not kwargs:  # these are all arguments of transformers' experts
        factors = _factors(chain_of(wrapper), x)
    if not factors:
        y: Tensor = type(wrapper).forward(wrapper, x, *args, **kwargs)
        return y
    top_k_index, top_k_weights = args
    return experts_forward(wrapper.get_base_layer(), x, top_k_index, top_k_weights, factors)


def why_never_fused(wrapper: ParamWrapper) -> str | None:
    """Why no call of an outermost wrapper can ever be fused; None if some can."""
    chain = chain_of(wrapper)
    if any(type(layer) is not ParamWrapper for layer in chain):
        return "it is not PEFT's own ParamWrapper"
    reasons = [why_not_experts(layer) for layer in chain]
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        return reason
    if "forward" in vars(wrapper) and not is_replaced(wrapper, "forward", fused_experts):
        return "its forward is wrapped by another tool"
    if not _inside_is_plain(chain):
        return "its experts have hooks or a wrapped forward"
    return None


def _inside_is_plain(chain: Sequence[ParamWrapper]) -> bool:
    """Whether a call of the outermost wrapper only runs the wrappers and the experts themselves."""
    modules = [*chain[1:], chain[0].get_base_layer()]
    return all(is_plain(module, type(module)) for module in modules)


def _factors(chain: Sequence[ParamWrapper], x: Tensor) -> dict[str, Factors] | None:
    """The adapters in a call with this x, by parameter; None if it cannot be fused, {} if none."""
    experts: ForeignExperts = chain[0].get_base_layer()
    weights = [experts._parameters.get(name) for name in projections(experts)]
    # Parametrized weights are missing while a forward of PEFT is running.
    if any(weight is None or weight.requires_grad for weight in weights):
        return None
    other = [weight for weight in weights if weight.dtype != x.dtype]
    if other and not torch.is_autocast_enabled(x.device.type):
        return None
    if not _inside_is_plain(chain) or any(w.disable_adapters or w.merged for w in chain):
        return None
    found = {}
    for wrapper in chain:
        active = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
        if len(active) > 1 or not all(_is_plain_adapter(wrapper, name) for name in active):
            return None
        for adapter in active:
            found[wrapper.parameter_name] = _operands(wrapper, adapter)
    return found


def _is_plain_adapter(wrapper: ParamWrapper, adapter: str) -> bool:
    variant = wrapper.lora_variant.get(adapter)
    return (
        (variant is None or type(variant) is StartVariant)
        and type(wrapper.lora_dropout[adapter]) is nn.Identity
        and all(is_plain(part[adapter]) for part in (wrapper.lora_A, wrapper.lora_B))
        and wrapper.lora_B[adapter].bias is None
    )


def _operands(wrapper: ParamWrapper, adapter: str) -> Factors:
    A, B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    start, scaling = start_of(wrapper, adapter), wrapper.scaling[adapter]
    lora_A, lora_B = stacks(wrapper, A, B)
    factor: Tensor | float = 1.0
    if isinstance(scaling, Tensor):  # PEFT's hot-swapping: another s does not recompile the model
        factor, scaling = scaling, 1.0
        lora_B = lora_B * factor
    if start is None:
        return Factors(lora_A, lora_B, scaling)

    def initial() -> tuple[Tensor, Tensor]:
        start_A, start_B = stacks(wrapper, *start)
        return start_A, start_B * factor

    return Factors(lora_A, lora_B, scaling, start=initial)
