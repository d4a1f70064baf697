"""`LoRAWrapper`: adapters around a layer whose weight cannot be rewritten, or not even read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .adapted import AdaptedLayer
from .adapter import Adapter
from .dequantize import dequantized_weight, frozen_forward, keep_unpacked, passes_gradient
from .kinds import is_conv1d
from .linear import merged_bias
from .state import change_by_gain


class LoRAWrapper(AdaptedLayer):
    """y = base_layer(x) + s · (drop(x) Aᵀ Bᵀ − x A₀ᵀ B₀ᵀ), mostly for quantized layers; plus s · b
    if B has a bias b. DoRA's magnitudes scale everything except the base layer's bias; every
    forward dequantizes the weight to compute the row norms.

    The residual is always "implicit": before the first step y equals base_layer(x) bit for bit,
    unless dropout is active. The wrapper passes unknown attributes on to the base layer.
    """

    base_layer: nn.Module
    transposed: bool  # whether the base layer is a `Conv1D`
    _differentiable: bool

    @classmethod
    def over(cls, base_layer: nn.Module) -> LoRAWrapper:
        """A wrapper around the layer, without adapters yet. Hooks stay on the layer."""
        layer = cls()
        layer._begin()
        layer.base_layer, layer.transposed = base_layer, is_conv1d(base_layer)
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
        """Adds an adapter.

        Raises:
            ValueError: the adapter's residual is not "implicit".

        """
        if adapter.residual != "implicit":
            raise ValueError("a wrapped layer's base is not rewritten: set residual='implicit'")
        super().attach(name, adapter)

    def freeze(self) -> None:
        """Sets the base layer's `requires_grad` to False."""
        self.base_layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features], in the base layer's output dtype."""
        y = frozen_forward(self.base_layer, x, self._differentiable)  # [..., out]
        if not self.adapter_enabled:
            return y
        update = self._update(x)
        adapter = self.active()
        gain = None if adapter.lora_magnitude is None else adapter.gain(self.base_weight())
        if gain is not None:  # [out]
            update = change_by_gain(y, getattr(self.base_layer, "bias", None), update, gain)
        return y + update.to(y.dtype)

    def _update(self, x: Tensor) -> Tensor:
        """s · (drop(x) Aᵀ Bᵀ − x A₀ᵀ B₀ᵀ) [..., out], as s · (z (B − B₀)ᵀ + (z − z₀) B₀ᵀ), whose
        two terms are both exactly zero before the first step.
        """
        adapter, compiling = self.active(), is_dynamo_compiling()
        p = adapter.lora_dropout if self.training else 0.0
        dropped = nn.functional.dropout(x, p, self.training)  # [..., in]
        z = nn.functional.linear(dropped, adapter.lora_A.to(x.dtype))  # [..., r]
        middle = adapter.middle()  # [r, r]
        if middle is not None:
            z = nn.functional.linear(z, middle.to(x.dtype))
        start_A, start_B = adapter.implicit_start()
        left = adapter.left()
        change = left if start_B is None else left - start_B  # [out, r]
        if compiling:
            change = adapter.scaled(change, x.dtype)
        update = nn.functional.linear(z, change.to(x.dtype))  # [..., out]
        if start_A is not None and start_B is not None:
            if compiling:
                start_B = adapter.scaled(start_B, x.dtype)
            z0 = nn.functional.linear(x, start_A.to(x.dtype))  # [..., r]
            update = update + nn.functional.linear(z - z0, start_B.to(x.dtype))
        update = update if compiling else update * adapter.scaling
        bias = adapter.output_bias(x.dtype)  # [out]
        return update if bias is None else update + bias.to(x.dtype)

    def base_weight(self) -> Tensor:
        """W [out, in], dequantized, in float32."""
        return dequantized_weight(self.base_layer)

    def base_linear(self) -> nn.Module:
        """The base layer itself."""
        return self.base_layer

    def restore_(self) -> nn.Module:
        """The base layer itself."""
        return self.base_layer

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A new `nn.Linear`: the dequantized weight with the active adapter merged, in float32."""
        adapter = self.active()
        matrix = dequantized_weight(self.base_layer)
        dtype = matrix.dtype
        # [k, in], [out, k]
        right, left = (factor.to(matrix.device) for factor in adapter.merge_factors())
        merged = matrix.to(right.dtype).addmm(left, right, alpha=adapter.scaling)
        gain = adapter.gain(matrix)  # [out]
        merged = (merged if gain is None else merged * gain[:, None]).to(dtype)
        bias = getattr(self.base_layer, "bias", None)
        bias = None if bias is None else bias.detach().to(dtype)
        bias = merged_bias(bias, adapter.output_bias(right.dtype), dtype)
        rows, cols = merged.shape
        linear = nn.Linear(cols, rows, bias is not None, device="meta")
        linear.weight = nn.Parameter(merged)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """The active adapter's settings."""
        return f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}"
