"""Which modules keep the matrices of their experts as 3-D parameters, and which of them can be
adapted: those whose class has transformers' decorator `use_experts_implementation`.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..._utils.checks import FLOATS
from ...init.sharded.layout import is_dtensor
from ...layers.adapter import Adapter
from .wrapped import has_parallel_forward

# What the decorator sets on every module, beside newer flags.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel")
_MEGA = "deepgemm_megamoe"  # the implementation that exchanges the tokens itself

ForeignExperts = Any  # a module that transformers defines


def is_experts(name: str, module: nn.Module) -> bool:
    """Whether the module `name` stacks its experts' matrices in one parameter, as transformers 5
    does.
    """
    stacked = any(p is not None and p.dim() == 3 for p in module._parameters.values())
    if isinstance(module, Adapter):
        return False
    return stacked and "expert" in f"{name} {type(module).__name__}".lower()


def projections(experts: ForeignExperts) -> tuple[str, str]:
    """The names of the two 3-D parameters: the one that x is multiplied with, and "down_proj"."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def keeps_own_forward(module: nn.Module) -> bool:
    """Whether the module has its class's forward as an attribute, as accelerate leaves it when it
    removes its hook.
    """
    function: Any = getattr(vars(module).get("forward"), "__func__", None)
    return function is not None and function is type(module).forward


def why_not_adaptable(experts: nn.Module) -> str | None:
    """The reason why experts cannot be adapted; None if they can."""
    title = type(experts).__name__
    if not all(hasattr(experts, flag) for flag in _FLAGS):
        what = "3-D parameters that its class multiplies in its own way"
        return f"its experts are {what} ({title} is not one of transformers' decorated classes)"
    foreign: ForeignExperts = experts
    weights = [experts._parameters.get(name) for name in projections(experts)]
    if foreign._is_expert_parallel and not all(map(is_dtensor, weights)):
        what = "its experts are divided among processes (expert parallelism)"
        return f"{what}, but its weights do not tell which are here"
    if not hasattr(type(experts).forward, "__wrapped__") and not hasattr(
        type(experts), "adapted_from"
    ):
        return f"the forward of {title} is not the one of transformers' decorator"
    is_parallel = has_parallel_forward(experts)
    replaced = "forward" in vars(experts) and not keeps_own_forward(experts)
    if replaced and not is_parallel and not hasattr(experts, "_hf_hook"):
        return "the forward of its experts is replaced; undo that first"
    if is_parallel and getattr(foreign.config, "_experts_implementation", "") == _MEGA:
        return f"its experts run in a kernel that has no place for adapters ({_MEGA})"
    if is_parametrized(experts):
        return "the weights of its experts are computed; remove the parametrization first"
    for name in projections(experts):
        weight = experts._parameters.get(name)
        if weight is None:
            return f"its experts have no parameter {name!r} of their own"
        if weight.dtype not in FLOATS:
            return f"its experts are quantized ({weight.dtype})"
        if weight.dim() != 3:
            return f"its experts' {name} is {list(weight.shape)}, not [experts, ...]"
    return None
