"""`LoRAConv1D`: a layer with adapters that replaces a `Conv1D` of GPT-2 and uses its weight."""

from __future__ import annotations

import torch
from torch import nn

from ...init.sharded.layout import full_shape
from ..kinds import ForeignLayer
from .float_layer import AdaptedFloatLayer


class LoRAConv1D(AdaptedFloatLayer):
    """transformers' `Conv1D` with adapters: `LoRALinear` with W stored as [in, out].

    `weight` and `bias` are those of the `Conv1D`, frozen; `nx` is in_features, `nf` out_features.
    """

    transposed = True
    nx: int
    nf: int
    _class: type[ForeignLayer]

    @classmethod
    def over(cls, conv: ForeignLayer) -> LoRAConv1D:
        """A layer with the parameters of `conv`, and no adapter yet."""
        layer = cls()
        layer._take_over(conv)
        layer._describe(type(conv))
        return layer

    def _describe(self, former: type[nn.Module]) -> None:
        self.nx, self.nf = self.in_features, self.out_features = full_shape(self._stored())
        self._class = former

    def _base_class(self) -> type[nn.Module]:
        return self._class

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        with torch.device("meta"):
            conv = self._class(self.nf, self.nx)
        conv.weight, conv.bias = weight, bias
        return conv.train(self.training)
