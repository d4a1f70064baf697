"""`LoRAConv1D`: GPT-2's linear layer, whose weight is [in, out], with a low-rank adapter."""

from __future__ import annotations

import torch
from torch import nn

from ._transplant import transplant
from .adapted import AdaptedMatrix
from .adapter import AdapterOptions
from .init.base import Start


class LoRAConv1D(AdaptedMatrix):
    """transformers' `Conv1D` with an adapter: `LoRALinear` with W stored as [in, out].

    `weight` and `bias` are the Conv1D's own, frozen; `nx` is in_features and `nf` out_features.
    """

    transposed = True

    @classmethod
    def from_start(
        cls,
        conv: nn.Module,
        start: Start,
        options: AdapterOptions,
        changes_base: bool,
        adapter_name: str = "default",
    ) -> LoRAConv1D:
        """As `LoRALinear.from_start`."""
        layer = cls()
        layer.nx, layer.nf = layer.in_features, layer.out_features = conv.weight.shape
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.training = conv.training
        layer._class = type(conv)
        layer._begin_as(adapter_name, options, start, changes_base)
        transplant(conv, layer)
        return layer

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        with torch.device("meta"):
            conv = self._class(self.nf, self.nx)
        conv.weight, conv.bias = weight, bias
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """The sizes and the adapter's settings."""
        return (
            f"in_features={self.nx}, out_features={self.nf}, r={self.r}, "
            f"scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, "
            f"residual={self.residual!r}"
        )
