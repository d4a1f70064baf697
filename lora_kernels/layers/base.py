"""`BaseLayer`: one interface to every kind of layer; the kind is determined once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..init.sharded.layout import Shards, full_shape, is_flattened, is_sharded, local_part
from .adapted import AdaptedLayer, transplant
from .adapter import Adapter
from .dequantize import compute_dtype, dequantized_weight, device_of
from .kinds import (
    ATTENTION,
    CONVOLUTION,
    EMBEDDING,
    FLOAT_KINDS,
    OUT_PROJECTION,
    ForeignLayer,
    is_conv1d,
    kind_of,
    refuse_sharded,
)
from .linear import (
    AdaptedFloatLayer,
    LoRAAttention,
    LoRAConv,
    LoRAConv1D,
    LoRAEmbedding,
    LoRALinear,
    LoRAOutProjection,
)
from .linear.attention import IN_PROJ
from .linear.conv import change_flattened_, refuse_sharded_change
from .wrapper import LoRAWrapper

# An adapted layer's kind is that of the first class here of which it is an instance.
_FLOAT_CLASSES: dict[str, Any] = {
    OUT_PROJECTION: LoRAOutProjection,
    "linear": LoRALinear,
    "conv1d": LoRAConv1D,
    EMBEDDING: LoRAEmbedding,
    CONVOLUTION: LoRAConv,
    ATTENTION: LoRAAttention,
}


class BaseLayer:
    """A linear layer, embedding, convolution or attention that can be adapted, or has been.

    Attributes:
        module: the layer in the model.
        layer: the layer inside a `LoRAWrapper`; otherwise `module` itself.
        kind: the name that `layers.kinds.kind_of` returns.
        rewritable: whether the layer has a floating-point weight of its own, from which initial
            factors can be subtracted.
        transposed: whether the weight is stored as [in, out].
        num_experts: how many matrices the weight holds, if it is a 3-D weight of experts; else
            None.

    """

    num_experts: int | None = None

    def __init__(self, module: nn.Module, kind: str) -> None:
        self.module, self.kind = module, kind
        self.layer = module.base_layer if isinstance(module, LoRAWrapper) else module
        self.rewritable = kind in FLOAT_KINDS
        self.transposed = kind in ("conv1d", EMBEDDING) or is_conv1d(self.layer)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features); for experts, of each expert."""
        if self.rewritable or self.kind == "float8":
            rows, cols = full_shape(self.stored_weight)[-2:]
            return (cols, rows) if self.transposed else (rows, cols)
        layer: ForeignLayer = self.layer
        return layer.out_features, layer.in_features

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in, by its weight or by `compute_dtype`."""
        return self.stored_weight.dtype if self.rewritable else compute_dtype(self.layer)

    @property
    def device(self) -> torch.device:
        """The device of the layer's tensors."""
        return self.local.device if self.rewritable else device_of(self.layer)

    @property
    def sharded(self) -> bool:
        """Whether this process may have only a part of a `rewritable` weight: a DTensor of FSDP2 or
        tensor parallelism, or a partition of ZeRO-3.
        """
        return self.rewritable and is_sharded(self.stored_weight)

    @property
    def local(self) -> Tensor:
        """What this process has of the stored weight."""
        return local_part(self.stored_weight)

    def shards(self) -> Shards:
        """The local parts of W [out, in], or [E, out, in] for experts; all of W if not sharded."""
        return Shards.of(self.stored_weight, self.transposed)

    @property
    def stored_weight(self) -> Tensor:
        """The weight of a `rewritable` or float8 layer as stored, [in, out] if `transposed`."""
        return cast(Tensor, self.layer.weight)

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module that owns the weight, and the weight's attribute there."""
        return self.module, "weight"

    def parameter_name(self, name: str) -> str:
        """The name of the weight, of the layer called `name`."""
        return f"{name}.weight"

    @property
    def geometry(self) -> tuple[tuple[int, ...], int]:
        """The sizes of a convolution's kernels, and its groups; () and 1 for other layers."""
        if self.kind != CONVOLUTION:
            return (), 1
        layer: ForeignLayer = self.layer
        return tuple(layer.kernel_size), layer.groups

    def pattern_name(self, name: str) -> str:
        """The name that `rank_pattern` and `alpha_pattern` match for the layer `name`. For an
        attention's `out_proj` it is the attention's name, as in PEFT.
        """
        return name.rpartition(".")[0] if self.kind == OUT_PROJECTION else name

    def matrices(self) -> list[Tensor]:
        """`weight()`; for experts, which are one layer, the W [out, in] of each expert."""
        return [self.weight()]

    def weight(self) -> Tensor:
        """W [out, in], or [E, out, in] for experts, without adapters: a view if the layer is
        `rewritable`, else a new float32 matrix, dequantized.

        Raises:
            ValueError: the layer is not quantized yet, rejects inputs [n, in], or is not linear.

        """
        if not self.rewritable:
            return dequantized_weight(self.layer)
        weight = self.stored_weight.detach()
        return weight.mT if self.transposed else weight

    def change_(self, change: Callable[[Tensor], None]) -> None:
        """Calls `change` with `weight()` of a `rewritable` layer, which it may write to."""
        change(self.weight())

    def refuse_sharded(self, name: str) -> None:
        """Raises a ValueError that names the layer if its tensors are shards or not loaded."""
        if not isinstance(self.module, AdaptedFloatLayer):
            refuse_sharded(name, self.layer)
        elif is_flattened(self.stored_weight):
            raise ValueError(
                f"{name} is part of a flat parameter of FSDP: add all adapters before the model is "
                "wrapped"
            )

    def adapted(self, adapter: Adapter, adapter_name: str) -> AdaptedLayer:
        """The adapted layer, with this adapter added; the weight is not changed."""
        module: ForeignLayer = self.module
        layer: AdaptedLayer
        if isinstance(module, AdaptedLayer):
            layer = module
        elif self.sharded:
            layer = _FLOAT_CLASSES[self.kind].in_place(module)
        else:
            layer = (_FLOAT_CLASSES.get(self.kind) or LoRAWrapper).over(module)
            if self.rewritable:  # hooks stay on a layer inside a wrapper
                transplant(module, layer)
        layer.attach(adapter_name, adapter)
        return layer


class _Unsharded(BaseLayer):
    """A layer of a kind that cannot be adapted while it is sharded."""

    def refuse_sharded(self, name: str) -> None:
        """Raises a ValueError that names the layer if its tensors are sharded or not loaded."""
        super().refuse_sharded(name)
        try:
            refuse_sharded_change(self.stored_weight, "adapted")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def adapted(self, adapter: Adapter, adapter_name: str) -> AdaptedLayer:
        """As in `BaseLayer`.

        Raises:
            ValueError: the weight is sharded.

        """
        refuse_sharded_change(self.stored_weight, "adapted")
        return super().adapted(adapter, adapter_name)


class ConvolutionLayer(_Unsharded):
    """A convolution. Its weight [out, in / groups, k ...], flattened, is the matrix
    [out, in / groups · k ...].
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in / groups · k ...)."""
        rows, *rest = full_shape(self.stored_weight)
        return rows, math.prod(rest)

    def weight(self) -> Tensor:
        """W [out, in / groups · k ...]: a view, or a copy if the weight is not contiguous."""
        return self.stored_weight.detach().flatten(1)

    def shards(self) -> Shards:
        """All of W, which is not sharded."""
        return Shards.of(self.weight())

    def change_(self, change: Callable[[Tensor], None]) -> None:
        """As in `BaseLayer`."""
        change_flattened_(self.stored_weight, change)


class AttentionLayer(_Unsharded):
    """An `nn.MultiheadAttention`, whose matrix is `in_proj_weight` [3 · embed_dim, embed_dim]."""

    @property
    def stored_weight(self) -> Tensor:
        """The weight of queries, keys and values."""
        found = self.layer._parameters.get(IN_PROJ)
        return cast(Tensor, getattr(self.layer, IN_PROJ) if found is None else found)

    @property
    def place(self) -> tuple[nn.Module, str]:
        """The module that owns the weight, and the weight's attribute there."""
        return self.module, IN_PROJ

    def parameter_name(self, name: str) -> str:
        """The name of the weight, of the layer called `name`."""
        return f"{name}.{IN_PROJ}"


_LAYERS = {CONVOLUTION: ConvolutionLayer, ATTENTION: AttentionLayer}


def base_of(module: nn.Module) -> BaseLayer | None:
    """The `BaseLayer` of a module; None if the module cannot be adapted."""
    kind = next((kind for kind, cls in _FLOAT_CLASSES.items() if isinstance(module, cls)), None)
    if kind is None:
        kind = kind_of(module.base_layer if isinstance(module, LoRAWrapper) else module)
    return None if kind is None else _LAYERS.get(kind, BaseLayer)(module, kind)
