"""`AdaptedFloatLayer`: the base class of adapted layers whose weight can be rewritten."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..._utils.checks import check_rank
from ..._utils.source import frame_needs_values
from ...init import Initializer
from ...init.sharded.layout import Shards, fill_, is_sharded
from ...init.sharded.subtract import subtract_factors_here_
from ...init.sharded.whole import whole
from ...init.sharded.zero3 import gathered, is_partitioned
from ...ops.linear.factors import product_factors, without_autocast
from ...ops.philox import dropout_seed
from ..adapted import CLASS, FOREIGN, AdaptedLayer, class_of, exchange_class
from ..adapter import Adapter, in_forward
from ..kinds import ForeignLayer
from .parallel import (
    Update,
    check_input,
    is_parallel,
    on_parts,
    parallel_linear,
    refuse_parallel_dora,
)

# The attributes of an adapted layer in its `__dict__`.
_OWN = ("active_adapter", "adapter_enabled", "_active", "_cast_by_hooks")
ABSORBED = "_lora_absorbed"  # set on a Parameter from which initial factors were subtracted


if TYPE_CHECKING:
    from typing_extensions import Self


class _Weight:
    """The attribute `weight` of an adapted layer: the stored Parameter.

    If a model's code read the stored weight during a forward to compute with it, without calling
    the layer, it would bypass the adapter. Such code gets W + s(BA − B₀A₀) instead, with the
    gradients of A, B and R. If the source shows the read, the layer is not adapted at all
    (`model.selection.bypassed`), but no source shows all reads. An attribute in an instance's
    `__dict__`, such as FSDP's view, takes precedence over this one.
    """

    def __get__(self, layer: AdaptedFloatLayer | None, cls: type) -> Any:
        if layer is None:
            return self
        stored = layer._parameters.get("weight")
        if stored is None:
            raise AttributeError("weight")
        if is_dynamo_compiling():  # the compiler removes what is not used
            return layer.effective_weight()
        if frame_needs_values(sys._getframe(1)) and in_forward():
            return layer.effective_weight()
        return stored


class AdaptedFloatLayer(AdaptedLayer):
    """An adapted layer with a floating-point W of its own, which it may rewrite.

    `weight` is W [out, in], or Wᵀ [in, out] if `transposed`; `bias` is [out] or None.
    """

    weight: nn.Parameter = _Weight()  # type: ignore[assignment]
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    transposed = False
    _weight_name = "weight"  # of the Parameter W
    _cast_by_hooks = False  # whether something casts or moves the weight around every forward

    def matrix(self) -> Tensor:
        """A view of the stored weight as [out, in]; absorbed initial factors are not added back."""
        weight = self._here()
        return weight.T if self.transposed else weight

    def _here(self) -> Tensor:
        """The stored W, in its own shape."""
        stored = self._parameters.get(self._weight_name)
        if stored is not None:
            return stored
        view: Tensor = vars(self)[self._weight_name]  # by FSDP, of its flat parameter
        return view

    def base_weight(self) -> Tensor:
        """The W of `matrix` before the layer was adapted: a view, or a copy to which absorbed
        factors were added back. All processes gather a weight that ZeRO-3 has partitioned.
        """
        stored = self._parameters.get(self._weight_name)
        if stored is None or not is_partitioned(stored):
            return super().base_weight()
        weight = gathered(stored)
        matrix = weight.T if self.transposed else weight
        if self.absorbed:
            self.adapter(self.absorbed).add_absorbed_(Shards.of(matrix))
        return matrix

    def effective_weight(self) -> Tensor:
        """The weight that the forward multiplies with, in the layout and dtype of `weight`:
        W + s(BA − B₀A₀), with BRA for BA if there is an R, and the gradients of A, B and R. With
        magnitudes, its rows have these norms, and m gets its gradient too. It has no dropout. If
        adapters are disabled, it is the base's W.
        """
        stored = self.matrix()
        if not self.adapter_enabled:
            matrix = self.base_weight()
        else:
            adapter = self.active()
            work = torch.promote_types(stored.dtype, adapter.lora_A.dtype)
            update = Update.of(adapter, work)
            if is_parallel(stored, adapter.lora_A, adapter.lora_B):
                refuse_parallel_dora(adapter)
                matrix = on_parts(stored, update, _updated)
            else:
                matrix = _updated(stored, update, adapter.gain(stored))
        return matrix.T if self.transposed else matrix

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features], in x's dtype. Under tensor parallelism,
        where the weight is a DTensor, x and y are DTensors too.
        """
        if not self.adapter_enabled:  # a compiled forward must not depend on which is active
            return self._base_forward(x)
        adapter, matrix = self.active(), self.matrix()
        p = adapter.lora_dropout if self.training else 0.0
        if is_parallel(x, matrix, adapter.lora_A, adapter.lora_B):
            refuse_parallel_dora(adapter)
            return parallel_linear(x, matrix, self.bias, Update.of(adapter, x.dtype), p)
        if self._cast_by_hooks:  # a view keeps its data for the backward, the Parameter does not
            matrix = matrix.view_as(matrix)
        lora_B, scaling, start_A, start_B = adapter.operands(x.dtype)
        factors = (adapter.lora_A, lora_B)  # [r, in], [out, r]
        seed = dropout_seed(x.device) if p else None
        others = (scaling, p, seed, start_A, start_B, adapter.middle())  # [r, in], [out, r], [r, r]
        if adapter.lacks("lora_magnitude"):
            y: Tensor = torch.ops.lora.linear(x, matrix, self.bias, *factors, *others)
        else:
            magnitude = adapter.lora_magnitude  # [out]
            y = torch.ops.lora.dora_linear(x, matrix, self.bias, *factors, magnitude, *others)
        bias = adapter.output_bias(x.dtype)  # [out]
        return y if bias is None else y + bias.to(y.dtype)

    def _base_forward(self, x: Tensor) -> Tensor:
        """`forward` of the layer before it was adapted."""
        absorbing = self.adapter(self.absorbed) if self.absorbed else None
        factors = () if absorbing is None else (absorbing.lora_A, absorbing.lora_B)
        matrix = self.matrix()
        if not is_parallel(x, matrix, *factors):
            return nn.functional.linear(x, self.base_weight(), self.bias)
        # What was subtracted from W is added to y: a local part of W does not say which part it is.
        update = None if absorbing is None else Update.of_absorbed(absorbing)
        if update is not None:
            return parallel_linear(x, matrix, self.bias, update)
        check_input(x, matrix)
        return nn.functional.linear(x, matrix, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedFloatLayer:
        self._cast_by_hooks = self._cast_by_hooks or in_forward()
        super()._apply(fn, recurse)
        return self

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As in `nn.Module`, except that torch's parallel styles find only the layer itself. They
        would take all modules inside it for layers of its kind. So `parallelize_module` leaves the
        factors whole.
        """
        if _is_parallel_style(sys._getframe(1)):
            return iter([("", self)])
        return super().named_modules(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in `nn.Module`, except that torch's parallel styles find only the layer's own."""
        if _is_parallel_style(sys._getframe(1)):
            kwargs["recurse"] = False
        return super().named_parameters(*args, **kwargs)

    def freeze(self) -> None:
        """Sets `requires_grad` of W and the bias to False, and marks a W with absorbed factors."""
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if self.absorbed:
            setattr(self.weight, ABSORBED, True)

    @torch.no_grad()
    def base_linear(self) -> nn.Module:
        """A copy of the original layer.

        W is exact if the residual is implicit or the initial B₀A₀ was zero; otherwise adding s·B₀A₀
        back costs one rounding to W's dtype.
        """
        return self._copied(self.base_weight().detach().clone())

    @torch.no_grad()
    def restore_(self) -> nn.Module:
        """The original layer, with this layer's own parameters: absorbed initial factors are added
        to W in place. This layer must not be used afterwards. If W is sharded, the original layer
        is this module.
        """
        if self.absorbed:
            stored = self._stored()
            self.adapter(self.absorbed).add_absorbed_(Shards.of(stored, self.transposed))
            vars(stored).pop(ABSORBED, None)
        return self._given_back() if self.sharded else self._plain(self.weight, self.bias)

    @torch.no_grad()
    def merged(self, shared: bool = False) -> nn.Module:
        """`to_linear()`; if W is sharded, this module, to whose parameters the update is added in
        place, in float32 or wider and rounded once. If other modules have W too (`shared`), the
        module gets its own W.

        Raises:
            ValueError: as `check_mergeable`.

        """
        if not self.sharded:
            return self.to_linear()
        adapter = self.active()
        self.check_mergeable(adapter, shared)
        if shared:
            self.weight = nn.Parameter(self._stored().detach().clone(), requires_grad=False)
        right, left = adapter.merge_factors()  # [k, in], [out, k]
        added = None if adapter.lora_bias is None else whole(adapter.lora_bias) * adapter.scaling
        stored = self._stored()
        subtract_factors_here_(Shards.of(stored, self.transposed), right, left, -adapter.scaling)
        vars(stored).pop(ABSORBED, None)
        if added is not None and self.bias is not None:
            fill_(self.bias, rounded_sum(whole(self.bias), added))
        return self._given_back()

    def check_mergeable(self, adapter: Adapter, shared: bool) -> None:
        """Raises ValueError if an adapter cannot be merged into a sharded W; `shared` says whether
        other modules have this W too.
        """
        stored = self._parameters.get(self._weight_name)
        if stored is None or not is_sharded(stored):
            return
        if adapter.lora_magnitude is not None:
            raise ValueError(
                "the adapter is a DoRA one (use_dora), which is not merged into a sharded weight: "
                "save the adapter and merge on one process, or use lora-kernels merge"
            )
        if adapter.lora_bias is not None and self.bias is None:
            raise ValueError(
                "the adapter has a bias of lora_B, but a layer without one cannot get one while it "
                "is sharded: merge on one process"
            )
        if shared and is_partitioned(stored):
            raise ValueError(
                "its weight is tied to another module's, and ZeRO-3 cannot part them: save the "
                "adapter and merge on one process"
            )

    @property
    def sharded(self) -> bool:
        """Whether this process may have only a part of W."""
        return is_sharded(self._stored())

    def _stored(self) -> nn.Parameter:
        """The Parameter W, as it is stored."""
        stored = self._parameters[self._weight_name]
        if stored is None:
            raise RuntimeError("the weight is a view of a flat parameter of FSDP")
        return stored

    @classmethod
    def in_place(cls: type[Self], layer: ForeignLayer) -> Self:
        """The layer itself, with its class changed to this one, and no adapter yet. It is for
        sharded layers, because FSDP2 keeps a reference to the module of every parameter.
        """
        former = class_of(layer)
        exchange_class(layer, cls)
        adapted: Self = layer
        object.__setattr__(adapted, CLASS, former)
        adapted._describe(former)
        adapted._begin()
        return adapted

    def _describe(self, former: type[nn.Module]) -> None:
        """Sets the attributes that a layer of the class `former` lacks."""

    def _given_back(self) -> nn.Module:
        """The module itself, with its former class and without adapters."""
        former = vars(self).get(CLASS) or self._base_class()
        del self.adapters
        for name in (CLASS, FOREIGN, *_OWN):
            vars(self).pop(name, None)
        module: nn.Module = self
        exchange_class(module, former)
        return module

    def _base_class(self) -> type[nn.Module]:
        """The class of the layer without adapters."""
        raise NotImplementedError

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """A new layer of the original kind, with the active adapter merged.

        Its weight is W + s·(BA − B₀A₀), with BRA for BA if there is an R; if there are magnitudes,
        its rows have the norms m. It is computed in float32 or wider and rounded once. A bias of B
        is added to the layer's bias; a layer without a bias gets one.

        Raises:
            ValueError: W is sharded.

        """
        if is_sharded(self.matrix()):
            raise ValueError("the weight is sharded: merge_lora(model) merges it in place")
        adapter = self.active()
        matrix = self.matrix().detach()
        right, left = (factor.to(matrix.device) for factor in adapter.merge_factors())
        gain = adapter.gain(matrix)  # [out]
        matrix = matrix.to(right.dtype, copy=True)  # [out, in] + [out, k] [k, in]
        merged = matrix.addmm_(left, right, alpha=adapter.scaling)
        if gain is not None:
            merged *= gain[:, None]
        added: Any = adapter.output_bias(right.dtype)
        if added is not None and is_sharded(added):
            added = whole(added)
        return self._copied(merged.to(self.matrix().dtype), added)

    def _take_over(self, layer: ForeignLayer) -> None:
        """Takes over the parameters of the layer to adapt; there is no adapter yet."""
        self.weight, self.bias = layer.weight, layer.bias
        self.training = layer.training
        self._begin()

    def _copied(self, matrix: Tensor, added: Tensor | None = None) -> nn.Module:
        """A new layer with W = `matrix` [out, in] and a copy of the bias plus `added` [out]."""
        weight = matrix.T.contiguous() if self.transposed else matrix
        bias = merged_bias(self.bias, added, matrix.dtype)
        return self._plain(nn.Parameter(weight), None if bias is None else nn.Parameter(bias))

    def _plain(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
        """The layer without adapters, with these parameters."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = (f"{prefix}adapters.", f"{prefix}_extra_state")
        is_base = self.absorbed and not any(key.startswith(own) for key in state_dict)
        if is_base and prefix + self._weight_name in state_dict:
            rest[-1].append(  # the last argument is the list of errors
                f"{prefix}{self._weight_name} is an original weight, but this layer's adapter "
                "subtracted its start from the weight (residual='absorb'): load the base first and "
                "adapt it then"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """The sizes and the active adapter's settings."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, scaling={self.scaling:g}, "
            f"lora_dropout={self.lora_dropout:g}, residual={self.residual!r}"
        )


def _is_parallel_style(frame: FrameType) -> bool:
    """Whether the frame's code is that of `parallelize_module` and its styles."""
    origin: str = frame.f_globals.get("__name__", "")
    return origin.startswith("torch.distributed.tensor.")


def _updated(stored: Tensor, update: Update, gain: Tensor | None = None) -> Tensor:
    """W + s(BA − B₀A₀) [out, in], with BRA for BA if there is an R, and with rows multiplied by
    `gain` [out] if that is given; in W's dtype.
    """
    factors = (update.lora_A, update.lora_B, update.lora_R, update.start_A, update.start_B)
    with without_autocast(stored):
        right, left = product_factors(*factors)
        work = torch.promote_types(stored.dtype, right.dtype)
        pair = (left.to(work), right.to(work))
        matrix = torch.addmm(stored.to(work), *pair, alpha=update.scaling)
    return (matrix if gain is None else matrix * gain[:, None]).to(stored.dtype)


def merged_bias(bias: Tensor | None, added: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A new tensor `bias` + `added` [out], each of which may be None; in the dtype of `bias`, or in
    `dtype` if `bias` is None.
    """
    if added is None:
        return None if bias is None else bias.detach().clone()
    if bias is None:
        return added.detach().to(dtype, copy=True)
    return rounded_sum(bias.detach(), added.detach())


def rounded_sum(tensor: Tensor, added: Tensor) -> Tensor:
    """The sum in the dtype and on the device of `tensor`, rounded once."""
    work = torch.promote_types(tensor.dtype, added.dtype)
    return (tensor.to(work) + added.to(tensor.device)).to(tensor.dtype)


def check_startable(matrix: Tensor, weight: Tensor, r: int, initializer: Initializer) -> None:
    """Raises ValueError if initial factors of rank r cannot be computed from W = `matrix`
    [out, in], a view of `weight`: r is too large, another adapter's initial factors were subtracted
    from W, or W is needed and on the meta device.
    """
    check_rank(r, *matrix.shape)
    if getattr(weight, ABSORBED, False):
        raise ValueError(
            "another adapter's initial factors were already subtracted from this weight "
            "(residual='absorb'); adapt it with residual='implicit' if several adapters share it"
        )
    if (initializer.changes_base or initializer.reads_weight) and weight.is_meta:
        raise ValueError(
            f"{type(initializer).__name__} reads the weight, which is on the meta device: "
            "load it first"
        )
