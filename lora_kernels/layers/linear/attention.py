"""`LoRAAttention`: a layer with adapters that replaces an `nn.MultiheadAttention` and uses its
weights.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..._utils.source import is_trusted
from ...init.sharded.layout import Shards
from ...ops.linear.factors import without_autocast
from ..adapter import in_forward
from ..kinds import ForeignLayer
from .conv import WholeFloatLayer
from .float_layer import ABSORBED, AdaptedFloatLayer, merged_bias
from .linear import LoRALinear

IN_PROJ = "in_proj_weight"
_OPTIONS = (
    *("embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "num_heads", "dropout", "batch_first"),
    *("head_dim", "add_zero_attn"),
)


class LoRAOutProjection(LoRALinear):
    """`out_proj` of a `LoRAAttention`, which reads its weight and never calls the layer."""

    def _base_class(self) -> type[nn.Module]:
        return NonDynamicallyQuantizableLinear

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
        linear = super()._plain(weight, bias)
        linear.__class__ = NonDynamicallyQuantizableLinear
        return linear


class _InProjection:
    """The attribute `in_proj_weight`: the stored Parameter, or W + s(BA − B₀A₀) for a model's code
    that reads the attribute during a forward in order to compute with it.
    """

    def __get__(self, layer: LoRAAttention | None, cls: type) -> Any:
        if layer is None:
            return self
        stored = layer._parameters.get(IN_PROJ)
        if stored is None:
            raise AttributeError(IN_PROJ)
        if is_dynamo_compiling():  # the compiler removes what is not used
            return layer.effective_weight()
        by_model = not is_trusted(sys._getframe(1).f_globals.get("__name__", ""))
        return layer.effective_weight() if by_model and in_forward() else stored


class LoRAAttention(WholeFloatLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose `in_proj_weight` W [3 · embed_dim, embed_dim] is
    W + s(BA − B₀A₀), with A [r, embed_dim] and B [3 · embed_dim, r]. Queries, keys and values share
    A, unless `LoRAConfig.fused_parts` gives each its own A. The `out_proj` is a layer with its own
    adapter, a `LoRAOutProjection`. Initial factors, R and the residual are as for `LoRALinear`.

    Every forward computes both adapted weights, rounded to their dtype, and calls the forward of
    `nn.MultiheadAttention` with them, in evaluation its fast path too. PEFT does the same. As in
    PEFT, `lora_dropout` has no effect, because the update has no input of its own.
    """

    in_proj_weight: nn.Parameter = _InProjection()  # type: ignore[assignment]
    _weight_name = IN_PROJ
    _class: type[nn.MultiheadAttention]

    @classmethod
    def over(cls, attention: ForeignLayer) -> LoRAAttention:
        """A layer with the parameters and the `out_proj` of `attention`, and no adapter yet."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        _take_over(attention, layer)
        layer.out_proj, layer.training = attention.out_proj, attention.training
        layer.in_features, layer.out_features = layer.embed_dim, 3 * layer.embed_dim
        layer._class = type(attention)
        layer._begin()
        return layer

    def _base_class(self) -> type[nn.Module]:
        return self._class

    def forward(  # type: ignore[override]
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As in `nn.MultiheadAttention`."""
        computing: Any = _Computing(self)
        found: tuple[Tensor, Tensor | None] = nn.MultiheadAttention.forward(
            computing, *args, **kwargs
        )
        return found

    def freeze(self) -> None:
        """Sets `requires_grad` of `in_proj_weight` and of the biases to False, and marks a weight
        with absorbed factors.
        """
        for parameter in self._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
        if self.absorbed:
            setattr(self._stored(), ABSORBED, True)

    @torch.no_grad()
    def restore_(self) -> nn.Module:
        """As in `AdaptedFloatLayer`; `out_proj` stays as it is.

        Raises:
            ValueError: the layer is sharded, and initial factors were absorbed.

        """
        stored = self._stored()
        if self.absorbed:
            self.check_restorable()
            self.adapter(self.absorbed).add_absorbed_(Shards.of(stored.detach()))
            vars(stored).pop(ABSORBED, None)
        if self.sharded:
            return self._given_back()
        return self._attention(stored, self.in_proj_bias, self.out_proj)

    @torch.no_grad()
    def base_linear(self) -> nn.Module:
        """A copy of the original layer."""
        out_proj: Any = self.out_proj
        adapted = isinstance(out_proj, AdaptedFloatLayer)
        out_proj = out_proj.base_linear() if adapted else out_proj
        bias = merged_bias(self.in_proj_bias, None, self.matrix().dtype)
        return self._made(self.base_weight().detach().clone(), bias, out_proj)

    def _copied(self, matrix: Tensor, added: Tensor | None = None) -> nn.Module:
        out_proj: Any = self.out_proj
        out_proj = out_proj.to_linear() if isinstance(out_proj, AdaptedFloatLayer) else out_proj
        return self._made(matrix, merged_bias(self.in_proj_bias, added, matrix.dtype), out_proj)

    def _made(self, weight: Tensor, bias: Tensor | None, out_proj: nn.Module) -> nn.Module:
        own = None if bias is None else nn.Parameter(bias)
        return self._attention(nn.Parameter(weight), own, out_proj)

    def _attention(
        self, weight: nn.Parameter, bias: nn.Parameter | None, out_proj: nn.Module
    ) -> nn.Module:
        """The attention without its own adapters, with these parts."""
        plain: Any = self._class.__new__(self._class)
        nn.Module.__init__(plain)
        _take_over(self, plain)
        plain.in_proj_weight, plain.in_proj_bias = weight, bias
        plain.out_proj = out_proj
        trained: nn.Module = plain.train(self.training)
        return trained

    def extra_repr(self) -> str:
        """The sizes and the active adapter's settings."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, r={self.r}, "
            f"scaling={self.scaling:g}, residual={self.residual!r}"
        )


class _Computing:
    """Stands in for an attention in the forward of `nn.MultiheadAttention`, with the weights and
    biases of the active adapter. The attention itself does not change, because other threads may
    run it.
    """

    def __init__(self, attention: LoRAAttention) -> None:
        self.attention = attention
        with without_autocast(attention.matrix()):  # which would round the factors
            self.in_proj_weight = attention.effective_weight()
            self.in_proj_bias = _with_bias_of_B(attention, attention.in_proj_bias)
            self.out_proj = _Projection(attention.out_proj)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)


class _Projection:
    """Weight and bias of `out_proj`, adapted or not."""

    def __init__(self, out_proj: nn.Linear) -> None:
        self.weight: Tensor
        self.bias: Tensor | None
        if isinstance(out_proj, AdaptedFloatLayer):
            self.weight = out_proj.effective_weight()
            self.bias = _with_bias_of_B(out_proj, out_proj.bias)
        else:
            self.weight, self.bias = out_proj.weight, out_proj.bias


def _with_bias_of_B(layer: AdaptedFloatLayer, bias: Tensor | None) -> Tensor | None:
    """The bias of a layer [out] plus that of its active adapter's B, in the weight's dtype."""
    dtype = layer.matrix().dtype
    added = layer.active().output_bias(dtype) if layer.adapter_enabled else None
    if added is None:
        return bias
    return added.to(dtype) if bias is None else bias + added.to(dtype)


def _take_over(old: ForeignLayer, new: ForeignLayer) -> None:
    """Gives `new` the parameters and options of an attention."""
    for name in _OPTIONS:
        object.__setattr__(new, name, getattr(old, name))
    for name, parameter in old._parameters.items():
        new.register_parameter(name, parameter)
    for name in ("bias_k", "bias_v"):
        if name not in old._parameters:  # None, in an attention without this parameter
            object.__setattr__(new, name, None)
