"""`BaseLayer`: a linear layer as adapters see it, whatever it is. What it is is found out once."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .adapted import AdaptedLayer, transplant
from .adapter import Adapter
from .dequantize import compute_dtype, dequantized_weight, device_of
from .kinds import FLOAT_KINDS, ForeignLayer, kind_of, refuse_sharded
from .linear import AdaptedFloatLayer, LoRAConv1D, LoRALinear
from .wrapper import LoRAWrapper

_OVER: dict[str, Callable[[ForeignLayer], AdaptedLayer]] = {
    "linear": LoRALinear.over,
    "conv1d": LoRAConv1D.over,
}


class BaseLayer:
    """A linear layer that can be adapted, or has been.

    `module` is the layer in the model, `layer` the same without a wrapper around it; `kind` is what
    `layers.kinds.kind_of` calls it; `rewritable` says whether its weight is in floating point and
    its own, so that a start can be subtracted from it; `transposed` whether it is stored as
    [in, out].
    """

    def __init__(self, module: nn.Module, kind: str) -> None:
        self.module, self.kind = module, kind
        self.layer = module.base_layer if isinstance(module, LoRAWrapper) else module
        self.rewritable = kind in FLOAT_KINDS
        self.transposed = kind == "conv1d"

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        if self.rewritable:
            rows, cols = self.stored_weight.shape
            return (cols, rows) if self.transposed else (rows, cols)
        layer: ForeignLayer = self.layer
        return layer.out_features, layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in, as far as it tells."""
        return self.stored_weight.dtype if self.rewritable else compute_dtype(self.layer)

    @property
    def device(self) -> torch.device:
        """Where the layer's tensors are."""
        return self.stored_weight.device if self.rewritable else device_of(self.layer)

    @property
    def stored_weight(self) -> Tensor:
        """The weight of a `rewritable` layer as it is stored, [in, out] if `transposed`."""
        return cast(Tensor, self.layer.weight)

    def weight(self) -> Tensor:
        """W [out, in] without adapters: a view if it is `rewritable`, else a new float32 matrix,
        dequantized.

        Raises:
            ValueError: the layer is not quantized yet, or does not take the inputs that it should.

        """
        if not self.rewritable:
            return dequantized_weight(self.layer)
        weight = self.stored_weight.detach()
        return weight.T if self.transposed else weight

    def refuse_sharded(self, name: str) -> None:
        """Raises ValueError, with the layer's name, if its tensors are shards or not loaded."""
        if not isinstance(self.module, AdaptedFloatLayer):
            refuse_sharded(name, self.layer)

    def adapted(self, adapter: Adapter, adapter_name: str) -> AdaptedLayer:
        """The layer with this adapter beside those that it has; its weight is not changed."""
        layer: AdaptedLayer
        if isinstance(self.module, AdaptedLayer):
            layer = self.module
        else:
            layer = _OVER.get(self.kind, LoRAWrapper.over)(self.module)
            if self.rewritable:  # a wrapped layer keeps its hooks
                transplant(self.module, layer)
        layer.attach(adapter_name, adapter)
        return layer


def base_of(module: nn.Module) -> BaseLayer | None:
    """The module as a base layer; None if it is no linear layer that can be adapted."""
    kind: str | None
    if isinstance(module, LoRALinear):
        kind = "linear"
    elif isinstance(module, LoRAConv1D):
        kind = "conv1d"
    else:
        kind = kind_of(module.base_layer if isinstance(module, LoRAWrapper) else module)
    return None if kind is None else BaseLayer(module, kind)
