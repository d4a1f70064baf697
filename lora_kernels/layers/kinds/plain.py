"""Checks whether a layer's forward and parameters are those that its class defines."""

from __future__ import annotations

from types import FunctionType

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from ..._utils.checks import FLOATS
from ...init.sharded.layout import is_dtensor

# The class of nn.MultiheadAttention's out_proj, whose forward is never called.
UNCALLED = (NonDynamicallyQuantizableLinear,)


def is_conv1d(module: object) -> bool:
    """Whether the module is GPT-2's `Conv1D`, a linear layer whose weight is [in, out]."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def has_float_weight(module: nn.Module) -> bool:
    """Whether the weight is a floating-point Parameter, sharded or not, and neither the weight nor
    the bias is a computed tensor (parametrized, hooked).
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return is_flattened_layer(module)
    if isinstance(vars(module).get("bias"), Tensor):
        return False
    return weight.dtype in FLOATS and (type(weight) is nn.Parameter or is_dtensor(weight))


def is_flattened_layer(module: nn.Module) -> bool:
    """Whether FSDP has replaced all Parameters by views of a flat one; weight_norm and pruning
    replace only some of them.
    """
    return (
        (is_plain(module) or is_conv1d(module) or isinstance(module, nn.Embedding))
        and isinstance(vars(module).get("weight"), Tensor)
        and all(parameter is None for parameter in module._parameters.values())
    )


def is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and why_not_plain(module) is None


def why_not_plain(linear: nn.Linear) -> str | None:
    """Why the layer does not compute x Wᵀ + b with parameters of its own; None if it does."""
    kind = type(linear)
    # transformers' FalconLinear computes x Wᵀ + b in two steps.
    falcon = kind.__name__ == "FalconLinear" and kind.__module__.startswith("transformers.")
    uncalled = isinstance(linear, UNCALLED)
    if (kind.forward is not nn.Linear.forward and not falcon) or uncalled:
        return f"{kind.__name__} does not compute as nn.Linear does"
    if forward_is_replaced(linear):
        return "the forward of this nn.Linear is replaced; undo that first"
    if is_parametrized(linear):  # the weight or the bias
        return "the weight is computed; remove its parametrization first"
    return None


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether the instance has its own forward. Forwards that call the forward of the class do not
    count: accelerate's hook, and transformers' tensor parallelism.
    """
    own = vars(module).get("forward")
    return own is not None and not hasattr(module, "_hf_hook") and not is_parallel_forward(own)


def is_parallel_forward(forward: object) -> bool:
    """Whether this is what transformers' tensor parallelism puts around a module's forward."""
    origin, name = (getattr(forward, key, "") for key in ("__module__", "__qualname__"))
    # accelerate's hook around it is a `functools.partial` of the same name.
    is_own = isinstance(forward, FunctionType) and name.endswith(".tp_forward")
    return is_own and origin.startswith("transformers.")
