"""PEFT's `ParamWrapper`s over the 3-D parameters of experts.

PEFT wraps an experts' module once for each adapted parameter, and only the outermost wrapper is
called. A wrapper keeps the factors of all E experts in two matrices: in the rows of A [E·r, in] the
expert varies slowest, and in the columns of B [out, r·E] it varies fastest.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor

from ...files.adapter.peft_format.experts.layouts import stacked, unstacked
from ...model.experts.base import ExpertsBase
from ...model.experts.kinds import ForeignExperts, projections, why_not_adaptable
from ...model.experts.module import stacks_of
from ...ops.linear.factors import product_factors

Start = tuple[Tensor, Tensor]  # A₀ and B₀
Factors = tuple[Tensor, Tensor, float]  # as PEFT's `get_delta_factors` returns them


def chain_of(wrapper: ParamWrapper) -> list[ParamWrapper]:
    """The wrapper and the wrappers inside it, the innermost last."""
    chain = [wrapper]
    while isinstance(chain[-1].base_layer, ParamWrapper):
        chain.append(chain[-1].base_layer)
    return chain


def outermost(layers: Iterable[LoraLayer]) -> list[ParamWrapper]:
    """The wrappers among a model's LoRA layers that no other wrapper contains."""
    wrappers = [layer for layer in layers if isinstance(layer, ParamWrapper)]
    inside = {id(wrapper.base_layer) for wrapper in wrappers}
    return [wrapper for wrapper in wrappers if id(wrapper) not in inside]


def why_not_experts(wrapper: ParamWrapper) -> str | None:
    """Why the parameter is not an experts' parameter that lora_kernels adapts; None if it is."""
    experts: ForeignExperts = wrapper.get_base_layer()
    title, parameter = type(experts).__name__, wrapper.parameter_name
    value = experts._parameters.get(parameter)
    if value is not None and value.dim() != 3:
        return f"its parameter, {parameter!r} of {title}, is no 3-D one of experts"
    reason = why_not_adaptable(experts)
    if reason is not None:
        return reason
    if parameter not in projections(experts):
        return f"its parameter, {parameter!r} of {title}, is none of {projections(experts)}"
    if stacks_of(experts):
        return "its experts have adapters of lora_kernels, too"
    if any(type(experts._parameters[name].data) is not Tensor for name in projections(experts)):
        return "the weights of its experts are shards or quantized tensors"
    return None


def experts_base(wrapper: ParamWrapper) -> ExpertsBase:
    """The parameter as `lora_kernels.model` sees it. `why_not_experts` must be None."""
    return ExpertsBase(wrapper.get_base_layer(), wrapper.parameter_name)


def stacks(wrapper: ParamWrapper, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """A [E, r, in], a view, and B [E, out, r], a copy, of the wrapper's A [E·r, in] and
    B [out, r·E]; gradients reach both.
    """
    return unstacked(lora_A, lora_B, wrapper.num_experts)


def in_layout_of(layer: LoraLayer, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in the layout of the layer's own parameters; for a wrapper from [E, r, in] and
    [E, out, r].
    """
    return stacked(lora_A, lora_B) if isinstance(layer, ParamWrapper) else (lora_A, lora_B)


def rank_in(layer: LoraLayer, lora_A: Tensor) -> int:
    """The rank of the layer's A."""
    return len(lora_A) // (layer.num_experts if isinstance(layer, ParamWrapper) else 1)


def delta_factors(wrapper: ParamWrapper, adapter: str, start: Start) -> Factors:
    """(left, right, s) with s · left @ right = s·(BA − B₀A₀) in the layout of the parameter, and in
    its dtype: PEFT's `get_delta_factors` for an adapter with a start, at rank 2r.

    The products are exactly zero while A = A₀ and B = B₀.
    """
    left, right = _update(wrapper, adapter, start)
    dtype = wrapper.get_param().dtype
    return left.to(dtype), right.to(dtype), wrapper.scaling[adapter]


def delta_weight(wrapper: ParamWrapper, adapter: str, start: Start) -> Tensor:
    """s·(BA − B₀A₀) in the layout, dtype and device of the parameter, computed in float32 or wider
    and rounded once: PEFT's `get_delta_weight` for an adapter with a start.
    """
    left, right = _update(wrapper, adapter, start)
    delta = torch.bmm(left, right) * wrapper.scaling[adapter]
    return delta.to(wrapper.get_param())


def _update(wrapper: ParamWrapper, adapter: str, start: Start) -> tuple[Tensor, Tensor]:
    """The factors of each expert's BA − B₀A₀, transposed if the parameter is stored transposed."""
    A, B = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    own, initial = stacks(wrapper, A, B), stacks(wrapper, *start)
    right, left = product_factors(*own, None, *initial)  # [E, 2r, in], [E, out, 2r]
    transposed = getattr(wrapper.get_base_layer(), "is_transposed", False)
    return (right.mT, left.mT) if transposed else (left, right)
