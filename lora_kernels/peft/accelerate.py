"""`accelerate`: one operator in place of the four of PEFT's LoRA layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from torch import Tensor, nn

from .._utils.checks import FLOATS
from ..layers.kinds import is_conv1d
from ..ops.philox import dropout_seed
from .layers import check_model, described, lora_layers
from .patch import is_replaced, replace_method, restore_method
from .variant import StartVariant, start_of


@dataclass
class AccelerateReport:
    """What `accelerate` did: the layers it took, and {name: reason} of those it left."""

    layers: list[str]
    left: dict[str, str]
    _taken: list[LoraLayer] = field(repr=False)

    def undo(self) -> None:
        """PEFT's own forward again, in all of these layers. A second call does nothing.

        Raises:
            RuntimeError: another tool has wrapped a layer's forward since; nothing was undone.

        """
        for name, layer in zip(self.layers, self._taken, strict=True):
            wrapped = "forward" in layer.__dict__
            if wrapped and not is_replaced(layer, "forward", fused_forward):
                raise RuntimeError(f"{name}: its forward was wrapped since: undo that first")
        for layer in self._taken:
            restore_method(layer, "forward", fused_forward)

    def __str__(self) -> str:
        total = len(self.layers) + len(self.left)
        lines = [f"fused forward in {len(self.layers)} of {total} LoRA layers"]
        return "\n".join(lines + described(self.left))


def accelerate(peft_model: peft.PeftModel) -> AccelerateReport:
    """Computes the LoRA layers of a PEFT model by `torch.ops.lora.linear`, forward and backward.

    The parameters stay PEFT's, so that optimisers, saving and all of PEFT's methods go on working.
    Taken are layers over a plain `nn.Linear` or GPT-2's `Conv1D` of floats, and in them the calls
    with one active adapter of plain LoRA, not merged and not disabled, with or without a start of
    `initialize`. Every other call (merged, several adapters, mixed batches ...) is PEFT's own. It
    is decided at each call.

    The results are PEFT's but for rounding, and but for the dropout mask, which is drawn from
    another generator. The operator computes in x's dtype: with a bfloat16 base and PEFT's default
    float32 adapters, A and B are rounded to bfloat16 for the product, which PEFT makes in float32.

    Raises:
        TypeError: not a `PeftModel`, or not of LoRA adapters.

    """
    check_model(peft_model)
    taken, left = {}, {}
    for name, layer in lora_layers(peft_model).items():
        reason = _why_never(layer)
        if reason is None:
            taken[name] = layer
        else:
            left[name] = reason
    for layer in taken.values():
        replace_method(layer, "forward", fused_forward)
    return AccelerateReport(list(taken), left, list(taken.values()))


def fused_forward(layer: Linear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[..., in] → [..., out], as PEFT's `Linear.forward`."""
    adapter = None if args or kwargs else _fusable_adapter(layer, x)
    if adapter is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    base, dropout = layer.base_layer, layer.lora_dropout[adapter]
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    return torch.ops.lora.linear(
        x,
        base.weight.T if layer.fan_in_fan_out else base.weight,
        base.bias,
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
        layer.scaling[adapter],
        p,
        dropout_seed(x.device) if p > 0 else None,
        *(start_of(layer, adapter) or (None, None)),
    )


def _why_never(layer: LoraLayer) -> str | None:
    """Why none of the layer's calls can be fused."""
    if type(layer) is not Linear:
        return f"PEFT's {type(layer).__name__} is not over a plain linear layer"
    base = layer.base_layer
    conv1d = is_conv1d(base)
    if type(base) is not nn.Linear and not conv1d:
        return f"its base is {type(base).__name__} and no plain linear layer"
    weight = base.weight
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if layer.fan_in_fan_out != conv1d:
        return "its fan_in_fan_out does not fit its base"
    if "forward" in layer.__dict__ and not is_replaced(layer, "forward", fused_forward):
        return "its forward is wrapped by another tool"
    if not _is_plain(base, type(base)):
        return "its base has hooks or a wrapped forward"
    reasons = [_why_not(layer, adapter) for adapter in layer.lora_A]
    return reasons[0] if reasons and all(reasons) else None


def _why_not(layer: Linear, adapter: str) -> str | None:
    """Why calls with this adapter cannot be fused."""
    variant = layer.lora_variant.get(adapter)
    if variant is not None and type(variant) is not StartVariant:
        return f"it is PEFT's {type(variant).__name__} and no plain LoRA"
    if layer.lora_bias[adapter]:
        return "its lora_B has a bias"
    if type(layer.lora_dropout[adapter]) not in (nn.Dropout, nn.Identity):
        return "its dropout is not nn.Dropout"
    if not (_is_plain(layer.lora_A[adapter]) and _is_plain(layer.lora_B[adapter])):
        return "its lora_A or lora_B has hooks or is wrapped"
    return None


def _fusable_adapter(layer: Linear, x: Tensor) -> str | None:
    """The one adapter whose call is fused, if this one is."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1 or _why_not(layer, active[0]) is not None:
        return None
    base = layer.base_layer
    if not _is_plain(base, type(base)):
        return None
    if x.dtype != base.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return None
    return active[0]


def _is_plain(module: nn.Module, kind: type = nn.Linear) -> bool:
    """Whether calling the module does what its class says, and nothing else."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
