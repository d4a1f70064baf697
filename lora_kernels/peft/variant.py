"""The constant s·B₀A₀ that a layer of PEFT subtracts for an adapter: y = x Wᵀ + s·x (BA − B₀A₀)ᵀ.

The factors are buffers of the layer, by the adapter's name, beside its `lora_A` and `lora_B`. They
take part through PEFT's own hook, a `LoraVariant`, which its forward, mixed batches, merging and
`delete_adapter` know, and through `get_delta_weight`, which torchao's merging and adapters weighted
by SVD ask without it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor
from torch.nn.functional import linear

from .patch import replace_method, restore_method

_BUFFERS = ("lora_start_A", "lora_start_B")


class StartVariant(LoraVariant):
    """The adapter of a layer that subtracts its start."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """PEFT has just made the adapter anew: it has no start."""
        drop_start(module, adapter_name)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """`result`, the base's, with the adapter's part. Where A and B are the start, that is zero
        to the bit: both parts are the same two products.
        """
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        start_A, start_B = module.lora_start_A[active_adapter], module.lora_start_B[active_adapter]
        adapter = lora_B(lora_A(module.lora_dropout[active_adapter](x)))
        start = linear(linear(x, start_A), start_B)  # no dropout: it belongs to the base
        return result + (adapter - start) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new weight with the adapter in it."""
        return _sum(orig_weight, module.get_delta_weight(active_adapter), 1)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """The same, into the weight."""
        merged = _sum(orig_weight.data, module.get_delta_weight(active_adapter), 1)
        orig_weight.data.copy_(merged)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the adapter."""
        return _sum(orig_weight.data, module.get_delta_weight(active_adapter), -1)


def _sum(weight: Tensor, delta: Tensor, sign: int) -> Tensor:
    """Weight ± delta, in the wider of their dtypes and rounded once to the weight's."""
    return torch.add(weight, delta.to(weight.device), alpha=sign).to(weight.dtype)


@torch.no_grad()
def delta_weight(layer: LoraLayer, adapter: str) -> Tensor:
    """s·(BA − B₀A₀) as PEFT's `get_delta_weight` gives s·BA: in the weight's layout and B's dtype;
    computed in float32 or wider, and rounded once.
    """
    start = start_of(layer, adapter)
    if start is None:
        return type(layer).get_delta_weight(layer, adapter)
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    work = torch.promote_types(B.dtype, torch.float32)
    A0, B0 = (factor.to(work) for factor in start)
    delta = (B.to(work) @ A.to(work) - B0 @ A0) * layer.scaling[adapter]
    return (delta.T if layer.fan_in_fan_out else delta).to(B.dtype)


def start_of(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor] | None:
    """A₀ [r, in] and B₀ [out, r] that the layer subtracts, if it does."""
    if adapter not in getattr(layer, _BUFFERS[0], ()):
        return None
    return layer.lora_start_A[adapter], layer.lora_start_B[adapter]


def set_start(layer: LoraLayer, adapter: str, start_A: Tensor, start_B: Tensor) -> None:
    """Makes the layer subtract s·B₀A₀ while the adapter is active.

    The factors are taken in the dtypes and to the devices of A and B, so that they cancel.
    """
    if not hasattr(layer, _BUFFERS[0]):
        for name in _BUFFERS:
            # In the state_dict: a checkpoint of the whole model has to have them.
            setattr(layer, name, BufferDict(persistent=True))
        # By these names PEFT finds what it has to move and to delete.
        layer.other_param_names = (*layer.other_param_names, *_BUFFERS)
        replace_method(layer, "get_delta_weight", delta_weight)
    for buffers, factor, like in (
        (layer.lora_start_A, start_A, layer.lora_A[adapter].weight),
        (layer.lora_start_B, start_B, layer.lora_B[adapter].weight),
    ):
        buffers[adapter] = factor.detach().to(like.device, like.dtype, copy=True)
    layer.lora_variant[adapter] = StartVariant()


def drop_start(layer: LoraLayer, adapter: str) -> None:
    """The layer subtracts nothing for this adapter. Nothing happens where it did not."""
    if start_of(layer, adapter) is None:
        return
    del layer.lora_start_A[adapter], layer.lora_start_B[adapter]
    del layer.lora_variant[adapter]
    if len(layer.lora_start_A) == 0:
        for name in _BUFFERS:
            delattr(layer, name)
        names = tuple(name for name in layer.other_param_names if name not in _BUFFERS)
        del layer.other_param_names  # ours, over the class's
        if names != layer.other_param_names:
            layer.other_param_names = names
        restore_method(layer, "get_delta_weight", delta_weight)
