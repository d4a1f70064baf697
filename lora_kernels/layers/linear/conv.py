"""`LoRAConv`: a layer with adapters that replaces an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` and
uses its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...init.sharded.layout import Shards, is_sharded
from ...ops.linear.factors import product_factors
from ..adapter import Adapter
from ..kinds import CONVOLUTIONS, ForeignLayer
from ..state import change_by_gain
from .float_layer import ABSORBED, AdaptedFloatLayer, merged_bias

_OPTIONS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("transposed", "output_padding", "groups", "padding_mode"),
    "_reversed_padding_repeated_twice",
)
# What to do if a sharded layer cannot be changed.
_INSTEAD = {
    "adapted": "add the adapter before the model is sharded",
    "merged": "save the adapter, and merge it into the model on one process",
    "unloaded": "load the model again",
}


class WholeFloatLayer(AdaptedFloatLayer):
    """An adapted layer of a kind whose weight cannot be rewritten while it is sharded."""

    def check_restorable(self) -> None:
        """Raises ValueError if the layer is sharded, and initial factors were absorbed."""
        if self.absorbed:
            refuse_sharded_change(self.matrix(), "unloaded")

    def check_mergeable(self, adapter: Adapter, shared: bool) -> None:
        """Raises ValueError if the weight is sharded."""
        stored = self._parameters.get(self._weight_name)
        if stored is not None:
            refuse_sharded_change(stored, "merged")


class LoRAConv(WholeFloatLayer):
    """y = conv(x, W) + b + s · conv₁(conv(drop(x), A), B), with W [out, in / groups, k ...] and b
    [out] frozen. conv has the layer's stride, padding, padding mode and dilation; conv₁ has kernels
    of size 1. A [r, in / groups · k ...] and B [out, r] are matrices: W is flattened from its
    second dimension on, and W + s·BA is the weight that `merge_lora` stores. R, λ, initial factors
    and the residual are as for `LoRALinear`.

    With `groups` > 1 all groups share A, and each group applies it to its own channels: W has one
    row for each output channel, over the channels of its group. PEFT's A reads the channels of all
    groups; this is not an update of W and cannot be merged.

    A, B and R are float32 (float64 over a float64 base), and are rounded to x's dtype for the
    forward; their differences and s are applied before that. Before the first step the update of an
    "implicit" residual is exactly zero, unless dropout is active.
    """

    kernel_size: tuple[int, ...]
    groups: int
    out_channels: int
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    _class: type[ForeignLayer]

    @classmethod
    def over(cls, conv: ForeignLayer) -> LoRAConv:
        """A layer with the parameters of `conv`, and no adapter yet."""
        kind = next(own for base, own in _CLASSES.items() if isinstance(conv, base))
        layer = kind.__new__(kind)
        nn.Module.__init__(layer)
        _copy_options(conv, layer)
        layer._take_over(conv)
        layer._describe(type(conv))
        return layer

    def _describe(self, former: type[nn.Module]) -> None:
        self._class = former
        self.out_features = self.out_channels
        self.in_features = self.matrix().shape[1]

    def _base_class(self) -> type[nn.Module]:
        return self._class

    def attach(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter, which gets the sizes of the kernels."""
        adapter.kernel, adapter.groups = tuple(self.kernel_size), self.groups
        super().attach(name, adapter)

    def _kernels(self) -> Tensor:
        """The stored weight [out, in / groups, k ...]."""
        weight = self._here()
        return weight.view_as(weight) if self._cast_by_hooks else weight

    def matrix(self) -> Tensor:
        """The stored weight as [out, in / groups · k ...]: a view, or a copy if the weight is not
        contiguous in memory, as in `channels_last`.
        """
        return self._kernels().flatten(1)

    def effective_weight(self) -> Tensor:
        """As in `AdaptedFloatLayer`, in the shape of `weight`."""
        return super().effective_weight().view(self._kernels().shape)

    def forward(self, input: Tensor) -> Tensor:
        """y [(batch,) out, ...] of x [(batch,) in, ...], in the dtype that the base returns."""
        if not self.adapter_enabled:  # a compiled forward must not depend on which is active
            return self._conv_forward(input, self._base_kernels(), self.bias)
        adapter = self.active()
        y = self._conv_forward(input, self._kernels(), self.bias)
        update = self._update(input, adapter)
        gain = adapter.gain(self.matrix())  # [out]
        if gain is not None:
            own = None if self.bias is None else self._along_channels(self.bias)
            update = change_by_gain(y, own, update, self._along_channels(gain))
        y = y + update.to(y.dtype)
        bias = adapter.output_bias(y.dtype)  # [out]
        return y if bias is None else y + self._along_channels(bias.to(y.dtype))

    def _base_kernels(self) -> Tensor:
        """The weight before the layer was adapted, in its own shape."""
        kernels = self._kernels()
        return self.base_weight().view(kernels.shape) if self.absorbed else kernels

    def _update(self, x: Tensor, adapter: Adapter) -> Tensor:
        """s · (conv(drop(x), BRA) − conv(x, B₀A₀)) [(batch,) out, ...], without the bias of B."""
        p = adapter.lora_dropout if self.training else 0.0
        lora_B, scaling, start_A, start_B = adapter.operands(x.dtype)
        factors = (adapter.lora_A, lora_B, adapter.middle(), start_A, start_B)
        right, left = product_factors(*factors)
        dropped = nn.functional.dropout(x, p) if p else x
        update = self._product(dropped, right, left * scaling)
        if p and start_A is not None and start_B is not None:  # they get x without dropout
            update = update + self._product(dropped - x, start_A, start_B * scaling)
        return update

    def _product(self, x: Tensor, right: Tensor, left: Tensor) -> Tensor:
        """conv₁(conv(x, A), B) for A = `right` [k, in / groups · k ...] and B = `left` [out, k]."""
        kernels = right.to(x.dtype).view(len(right), -1, *self.kernel_size)
        if self.groups > 1:
            kernels = kernels.repeat(self.groups, *(1 for _ in kernels.shape[1:]))
        z = self._conv_forward(x, kernels, None)  # [(batch,) groups · k, ...]
        weight = left.to(x.dtype).view(*left.shape, *(1 for _ in self.kernel_size))
        product: Tensor = _CONVOLUTION[len(self.kernel_size)](z, weight, groups=self.groups)
        return product

    def _along_channels(self, values: Tensor) -> Tensor:
        """[out] as [out, 1 ...], for outputs [(batch,) out, ...]."""
        return values.view(-1, *(1 for _ in self.kernel_size))

    @torch.no_grad()
    def restore_(self) -> nn.Module:
        """As in `AdaptedFloatLayer`.

        Raises:
            ValueError: the layer is sharded, and initial factors were absorbed.

        """
        stored = self._stored()
        if not self.absorbed:
            return super().restore_()
        self.check_restorable()
        absorbed = self.adapter(self.absorbed)
        change_flattened_(stored, lambda matrix: absorbed.add_absorbed_(Shards.of(matrix)))
        vars(stored).pop(ABSORBED, None)
        return self._plain(stored, self.bias)

    def _copied(self, matrix: Tensor, added: Tensor | None = None) -> nn.Module:
        kernels = self._kernels()
        weight = matrix.view(kernels.shape)
        if not kernels.is_contiguous():  # the copy has the original's memory format
            weight = torch.empty_like(kernels, dtype=matrix.dtype).copy_(weight)
        bias = merged_bias(self.bias, added, matrix.dtype)
        return self._plain(nn.Parameter(weight), None if bias is None else nn.Parameter(bias))

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        cls: Any = self._class
        plain = cls.__new__(cls)
        nn.Module.__init__(plain)
        _copy_options(self, plain)
        plain.weight = weight
        plain.register_parameter("bias", bias)
        trained: nn.Module = plain.train(self.training)
        return trained

    def extra_repr(self) -> str:
        """The sizes and the active adapter's settings."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, groups={self.groups}, bias={self.bias is not None}, "
            f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout:g}, "
            f"residual={self.residual!r}"
        )


class LoRAConv1d(LoRAConv, nn.Conv1d):  # type: ignore[misc]  # another `freeze`
    """`LoRAConv` over sequences."""


class LoRAConv2d(LoRAConv, nn.Conv2d):  # type: ignore[misc]
    """`LoRAConv` over images."""


class LoRAConv3d(LoRAConv, nn.Conv3d):  # type: ignore[misc]
    """`LoRAConv` over volumes."""


_CLASSES = dict(zip(CONVOLUTIONS, (LoRAConv1d, LoRAConv2d, LoRAConv3d), strict=True))
_CONVOLUTION = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


def _copy_options(old: ForeignLayer, new: ForeignLayer) -> None:
    """Gives `new` the sizes and options of a convolution."""
    for name in _OPTIONS:
        object.__setattr__(new, name, getattr(old, name))


def change_flattened_(weight: Tensor, change: Callable[[Tensor], None]) -> None:
    """Calls `change` with the weight [out, in / groups, k ...] as [out, in / groups · k ...], which
    it may write to. If the weight is not contiguous, `change` gets a copy that is written back.
    """
    stored = weight.detach()
    matrix = stored.flatten(1)
    change(matrix)
    if matrix.data_ptr() != stored.data_ptr():
        stored.copy_(matrix.view(stored.shape))


def refuse_sharded_change(weight: Tensor, what: str) -> None:
    """Raises ValueError if the weight of a convolution or attention is sharded. `what` is what the
    layer cannot be then: "adapted", "merged" or "unloaded".
    """
    if is_sharded(weight):
        raise ValueError(
            f"a convolution or attention that is sharded cannot be {what}: {_INSTEAD[what]}"
        )
