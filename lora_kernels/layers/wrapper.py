"""`LoRAWrapper`: an adapter around a layer whose weight cannot be rewritten, or not even read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..init.start import Start
from . import kinds
from .base import AdaptedLayer
from .options import AdapterOptions


class LoRAWrapper(AdaptedLayer):
    """y = base_layer(x) + s · (drop(x) Aᵀ Bᵀ − x A₀ᵀ B₀ᵀ), for quantised layers above all.

    The start is always subtracted ("implicit"): at the start y is base_layer(x) to the last bit,
    while no dropout is drawn. Attributes that it does not have are the base layer's.
    """

    @classmethod
    def from_start(
        cls,
        base_layer: nn.Module,
        start: Start,
        options: AdapterOptions,
        changes_base: bool,
        adapter_name: str = "default",
    ) -> LoRAWrapper:
        """The wrapped layer with a start that is made already. Hooks stay where they are."""
        if options.residual != "implicit":
            raise ValueError("a wrapped layer is not rewritten: residual must be 'implicit'")
        layer = cls()
        layer.base_layer = base_layer
        layer._differentiable = kinds.passes_gradient(base_layer)
        kinds.keep_unpacked(base_layer)
        layer.training = base_layer.training
        layer._begin_as(adapter_name, options, start, changes_base)
        return layer

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _freeze(self) -> None:
        self.base_layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features], in the dtype of the base layer's output."""
        y = kinds.frozen_forward(self.base_layer, x, self._differentiable)
        return y + self._update(x).to(y.dtype) if self.adapter_enabled else y

    def _update(self, x: Tensor) -> Tensor:
        """s·(B drop(x)A − B₀ x A₀), as (B − B₀) z + B₀ (z − z₀): both are zero at the start."""
        adapter = self.active()
        dropped = nn.functional.dropout(x, adapter.lora_dropout, self.training)
        z = nn.functional.linear(dropped, adapter.lora_A.to(x.dtype))
        if adapter.lora_R is not None:
            z = nn.functional.linear(z, adapter.lora_R.to(x.dtype))
        start_A, start_B = adapter._implicit_start()
        if start_A is None:
            return nn.functional.linear(z, adapter.lora_B.to(x.dtype)) * adapter.scaling
        z0 = nn.functional.linear(x, start_A.to(x.dtype))
        moved = nn.functional.linear(z, (adapter.lora_B - start_B).to(x.dtype))
        return (moved + nn.functional.linear(z - z0, start_B.to(x.dtype))) * adapter.scaling

    def base_linear(self) -> nn.Module:
        """The base layer itself."""
        return self.base_layer

    def restore_(self) -> nn.Module:
        """The base layer itself."""
        return self.base_layer

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A new `nn.Linear` in floating point, the dequantised weight and the active adapter."""
        adapter = self.active()
        matrix = kinds.dequantized_weight(self.base_layer)
        dtype = matrix.dtype
        right, left = adapter.layer_state().update_factors()
        right, left = right.to(matrix.device), left.to(matrix.device)
        merged = matrix.to(right.dtype).addmm(left, right, alpha=adapter.scaling).to(dtype)
        bias = getattr(self.base_layer, "bias", None)
        rows, cols = merged.shape
        linear = nn.Linear(cols, rows, bias is not None, device="meta")
        linear.weight = nn.Parameter(merged)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """The adapter's settings."""
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"
