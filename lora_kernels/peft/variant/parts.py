"""An adapter's tensors in a PEFT layer."""

from __future__ import annotations

from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import Tensor, nn

from ..._utils.checks import FLOATS
from ...layers.base import base_of

BUFFERS = ("lora_start_A", "lora_start_B")


def factors_of(layer: LoraLayer, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, in] and B [out, r] of an adapter that the layer has; for experts in PEFT's layout."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def adapters_in(layer: LoraLayer) -> list[str]:
    """The adapters that the layer has, as a linear layer or as an embedding."""
    return [*layer.lora_A, *layer.lora_embedding_A]


def start_of(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor] | None:
    """A₀ [r, in] and B₀ [out, r] that the layer subtracts for the adapter, for experts in the
    layout of A and B; None if it subtracts nothing.
    """
    if adapter not in getattr(layer, BUFFERS[0], ()):
        return None
    return layer.lora_start_A[adapter], layer.lora_start_B[adapter]


def magnitude_of(layer: LoraLayer, adapter: str) -> nn.Parameter | None:
    """The magnitudes of a DoRA adapter: [out], or [1, out, 1, 1] of a convolution; else None."""
    if adapter not in layer.lora_magnitude_vector:
        return None
    magnitude: nn.Parameter = layer.lora_magnitude_vector[adapter].weight
    return magnitude


def matrix_of(layer: LoraLayer) -> Tensor:
    """W [out, in] of a linear layer or embedding below the adapter: a view, or dequantized."""
    base = layer.get_base_layer()
    weight = base.weight
    if type(weight) is nn.Parameter and weight.dtype in FLOATS and weight.dim() == 2:
        transposed = layer.fan_in_fan_out or isinstance(layer, Embedding)
        return weight.detach().T if transposed else weight.detach()
    known = base_of(base)
    if known is None:
        raise TypeError(f"{type(base).__name__} is no linear layer known to lora_kernels")
    return known.weight()
