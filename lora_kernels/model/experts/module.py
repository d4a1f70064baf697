"""`LoRAExperts`: the class of an experts module with adapters. A module gets this class in place,
as with FSDP2 and `torch.nn.utils.parametrize`. It gets its own class back when its last adapter is
removed.

So its names, parameters, hooks and the code of its class stay: `state_dict`, `save_pretrained` and
`isinstance` see the module that they know.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...layers.adapted import class_of, exchange_class
from .forward import SUFFIX, experts_forward
from .kinds import ForeignExperts, keeps_own_forward, projections
from .stack import AdaptedStack
from .wrapped import use_own_forward

Class = Any  # a class of modules; type checkers see no Hashable, by nn.Module's annotations


class LoRAExperts(nn.Module):
    """Experts of a mixture, of which one or both 3-D parameters have adapters.

    The adapters of a parameter such as "down_proj" are the submodule "down_proj_lora", an
    `AdaptedStack`. A module whose adapters are all disabled, and subtract nothing from its weights,
    runs its own class's forward.
    """

    adapted_from: type[nn.Module]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The output [T, H] of hidden_states [T, H], with the experts `top_k_index` [T, k] and
        their weights `top_k_weights` [T, k]: the contract of transformers' experts.
        """
        stacks = stacks_of(self)
        found = {name: stack.factors(stack.weight.dtype) for name, stack in stacks.items()}
        factors = {name: own for name, own in found.items() if own is not None}
        if not factors:
            y: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return y
        return experts_forward(self, hidden_states, top_k_index, top_k_weights, factors)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Supports pickle and deepcopy, which cannot find this class by its name."""
        return _new, (type(self).adapted_from,), vars(self)


_CLASSES: dict[Class, Any] = {}


def _adapted_class(cls: Class) -> Any:
    """The subclass of an experts' class with adapters, one for each class."""
    if cls not in _CLASSES:
        name = f"LoRA{cls.__name__}"
        _CLASSES[cls] = type(name, (LoRAExperts, cls), {"adapted_from": cls})
    return _CLASSES[cls]


def _new(cls: type[nn.Module]) -> LoRAExperts:
    adapted = _adapted_class(cls)
    experts: LoRAExperts = adapted.__new__(adapted)
    return experts


def stacks_of(experts: nn.Module) -> dict[str, AdaptedStack]:
    """The stacks of a module, by the parameter's name; {} if it has no adapters."""
    if not isinstance(experts, LoRAExperts):
        return {}
    found = {name: experts._modules.get(name + SUFFIX) for name in projections(experts)}
    return {name: stack for name, stack in found.items() if isinstance(stack, AdaptedStack)}


def add_stack(experts: ForeignExperts, parameter: str) -> AdaptedStack:
    """The stack of one of the module's parameters, a new one if it has none."""
    stack = stacks_of(experts).get(parameter)
    if stack is None:
        if not isinstance(experts, LoRAExperts):
            _set_class(experts, _adapted_class(class_of(experts)))
        stack = AdaptedStack.over(experts, parameter)
        experts.add_module(parameter + SUFFIX, stack)
    return stack


def remove_stack(stack: AdaptedStack) -> None:
    """Removes the adapters of a parameter; the module gets its own class back with the last."""
    experts = stack.experts
    del experts._modules[stack.parameter + SUFFIX]
    if not stacks_of(experts):
        _set_class(experts, experts.adapted_from)


def _set_class(experts: ForeignExperts, cls: type[nn.Module]) -> None:
    """Changes the module's class. accelerate's hook and transformers' parallelism, which hold its
    bound forward, get the new one; `module.compile()` has to be called again.
    """
    if keeps_own_forward(experts):
        del experts.forward
    exchange_class(experts, cls)
    use_own_forward(experts)
    experts._compiled_call_impl = None
