"""`LoRAWrapper`: an adapter around a layer whose weight cannot be rewritten, or not even read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapted import AdaptedLayer
from .adapter import Adapter
from .dequantize import dequantized_weight, frozen_forward, keep_unpacked, passes_gradient


class LoRAWrapper(AdaptedLayer):
    """y = base_layer(x) + s · (drop(x) Aᵀ Bᵀ − x A₀ᵀ B₀ᵀ), for quantized layers above all.

    The forward always subtracts the start ("implicit"): at the start y is base_layer(x) to the last
    bit, unless dropout is drawn. Attributes that the wrapper does not have are the base layer's.
    """

    base_layer: nn.Module
    _differentiable: bool

    @classmethod
    def over(cls, base_layer: nn.Module) -> LoRAWrapper:
        """A wrapper around the layer, without an adapter yet. The layer keeps its hooks."""
        layer = cls()
        layer._begin()
        layer.base_layer = base_layer
        layer._differentiable = passes_gradient(base_layer)
        keep_unpacked(base_layer)
        layer.training = base_layer.training
        return layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def attach(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter, which must be "implicit"."""
        if adapter.residual != "implicit":
            raise ValueError("a wrapped layer's base is not rewritten: set residual='implicit'")
        super().attach(name, adapter)

    def freeze(self) -> None:
        """Sets the base layer's `requires_grad` to False."""
        self.base_layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features], in the dtype of the base layer's output."""
        y = frozen_forward(self.base_layer, x, self._differentiable)
        return y + self._update(x).to(y.dtype) if self.adapter_enabled else y

    def _update(self, x: Tensor) -> Tensor:
        """s·(B drop(x)A − B₀ x A₀), as (B − B₀) z + B₀ (z − z₀): both are zero at the start."""
        adapter = self.active()
        dropped = nn.functional.dropout(x, adapter.lora_dropout, self.training)
        z = nn.functional.linear(dropped, adapter.lora_A.to(x.dtype))  # [..., r]
        if adapter.lora_R is not None:
            z = nn.functional.linear(z, adapter.lora_R.to(x.dtype))
        start_A, start_B = adapter.implicit_start()
        if start_A is None or start_B is None:
            return nn.functional.linear(z, adapter.lora_B.to(x.dtype)) * adapter.scaling
        z0 = nn.functional.linear(x, start_A.to(x.dtype))  # [..., r]
        moved = nn.functional.linear(z, (adapter.lora_B - start_B).to(x.dtype))
        return (moved + nn.functional.linear(z - z0, start_B.to(x.dtype))) * adapter.scaling

    def base_weight(self) -> Tensor:
        """W [out, in], dequantized."""
        return dequantized_weight(self.base_layer)

    def base_linear(self) -> nn.Module:
        """The base layer itself."""
        return self.base_layer

    def restore_(self) -> nn.Module:
        """The base layer itself."""
        return self.base_layer

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A new `nn.Linear` in floating point: the dequantized weight and the active adapter."""
        adapter = self.active()
        matrix = dequantized_weight(self.base_layer)
        dtype = matrix.dtype
        right, left = (factor.to(matrix.device) for factor in adapter.merge_factors())
        merged = matrix.to(right.dtype).addmm(left, right, alpha=adapter.scaling).to(dtype)
        bias = getattr(self.base_layer, "bias", None)
        rows, cols = merged.shape
        linear = nn.Linear(cols, rows, bias is not None, device="meta")
        linear.weight = nn.Parameter(merged)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """The active adapter's settings."""
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"
