"""The constant s·B₀A₀ that a PEFT layer subtracts for an adapter: y = x Wᵀ + s·x (BA − B₀A₀)ᵀ.

A₀ and B₀ are buffers of the layer, by the adapter's name. They take effect in two places: in a
`LoraVariant`, PEFT's extension point, which PEFT uses in the forward, in mixed batches, for merging
and in `delete_adapter`; and in `get_delta_weight`, which PEFT calls without the variant to merge
torchao layers and to combine adapters by SVD.

For experts' parameters PEFT calls no variant. It forms W + s·BA by `get_delta_weight` or, if one
adapter is active, by `get_delta_factors`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.layer import Embedding, LoraLayer, LoraVariant, ParamWrapper
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from torch import Tensor
from torch.nn.functional import linear

from ..experts import wrappers
from ..patch import replace_method, restore_method
from .dora import DoraEmbeddingStartVariant, DoraStartVariant
from .parts import BUFFERS, adapters_in, factors_of, magnitude_of, start_of

_LOADED_WITHOUT = "A and B were loaded without the initial factors that the model subtracted"


class StartVariant(LoraVariant):
    """How PEFT computes an adapter that subtracts s·B₀A₀."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Removes old A₀ and B₀, because PEFT has just created the adapter anew."""
        drop_start(module, adapter_name)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """`result` [..., out], the base's output, plus s·x (BA − B₀A₀)ᵀ.

        While A = A₀ and B = B₀ the sum is exactly zero, because both products are the same.
        """
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        start_A, start_B = module.lora_start_A[active_adapter], module.lora_start_B[active_adapter]
        adapter = lora_B(lora_A(module.lora_dropout[active_adapter](x)))  # [..., out]
        start = linear(linear(x, start_A), start_B)  # [..., out]; no dropout, as for the base
        return result + (adapter - start) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """A new weight with the adapter merged, in the layout of `orig_weight`."""
        return _sum(orig_weight, module.get_delta_weight(active_adapter), 1)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Merges the adapter into the weight in place."""
        merged = _sum(orig_weight.data, module.get_delta_weight(active_adapter), 1)
        orig_weight.data.copy_(merged)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the adapter."""
        return _sum(orig_weight.data, module.get_delta_weight(active_adapter), -1)


class EmbeddingStartVariant(StartVariant):
    """`StartVariant` for an embedding: `x` are tokens, and the base's output is a look-up."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """`result` [..., D], the base's output, plus the columns of s·(BA − B₀A₀) [D, V],
        multiplied by the layer's `embed_scale` if it has one. No dropout is applied, as in PEFT.
        """
        lora_A, lora_B = factors_of(module, active_adapter)
        start_A, start_B = module.lora_start_A[active_adapter], module.lora_start_B[active_adapter]
        adapter = module._embed(x, lora_A.T) @ lora_B.T  # [..., D]
        start = module._embed(x, start_A.T) @ start_B.T
        update = (adapter - start) * module.scaling[active_adapter]
        scale = module._get_embed_scale()
        return result + (update if scale is None else update * scale.to(update.dtype))


# The variants of layers that subtract a start.
STARTED = (StartVariant, DoraStartVariant, DoraEmbeddingStartVariant)


def mixed_batch(
    layer: Embedding, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
) -> Tensor:
    """Replaces an embedding's `_mixed_batch_forward`, which calls no variant."""
    started = [name if start_of(layer, name) is not None else None for name in adapter_names]
    pairs = zip(adapter_names, started, strict=True)
    others = [name if own is None else "__base__" for name, own in pairs]
    own_forward = type(layer)._mixed_batch_forward
    result: Tensor = own_forward(layer, x, *args, adapter_names=others, **kwargs)
    for adapter in dict.fromkeys(name for name in started if name is not None):
        rows = [row for row, name in enumerate(started) if name == adapter]
        found = EmbeddingStartVariant.forward(layer, adapter, x[rows], result[rows])
        result[rows] = found.to(result.dtype)
    return result


def _sum(weight: Tensor, delta: Tensor, sign: int) -> Tensor:
    """`weight` ± `delta`, computed in the wider dtype and rounded once to the weight's."""
    return torch.add(weight, delta.to(weight.device), alpha=sign).to(weight.dtype)


@torch.no_grad()
def delta_weight(layer: LoraLayer, adapter: str) -> Tensor:
    """s·(BA − B₀A₀), which replaces PEFT's `get_delta_weight`, in the weight's layout and B's
    dtype; it is computed in float32 or wider and rounded once.
    """
    start = start_of(layer, adapter)
    if start is None:
        return type(layer).get_delta_weight(layer, adapter)
    A, B = factors_of(layer, adapter)
    work = torch.promote_types(B.dtype, torch.float32)
    A0, B0 = (factor.to(work) for factor in start)
    delta = (B.to(work) @ A.to(work) - B0 @ A0) * layer.scaling[adapter]
    transposed = layer.fan_in_fan_out or isinstance(layer, Embedding)
    return (delta.T if transposed else delta).to(B.dtype)


def experts_delta_weight(layer: ParamWrapper, adapter: str) -> Tensor:
    """s·(BA − B₀A₀), which replaces a wrapper's `get_delta_weight`; gradients reach A and B."""
    start = start_of(layer, adapter)
    if start is None:
        own: Tensor = type(layer).get_delta_weight(layer, adapter)
        return own
    return wrappers.delta_weight(layer, adapter, start)


def experts_delta_factors(layer: ParamWrapper, adapter: str) -> tuple[Tensor, Tensor, float]:
    """Factors of s·(BA − B₀A₀), which replace those of a wrapper's `get_delta_factors`."""
    start = start_of(layer, adapter)
    if start is None:
        own: tuple[Tensor, Tensor, float] = type(layer).get_delta_factors(layer, adapter)
        return own
    return wrappers.delta_factors(layer, adapter, start)


def _deltas(layer: LoraLayer) -> dict[str, Callable[..., Any]]:
    """The methods that compute the layer's update, with their replacements."""
    if isinstance(layer, Embedding):
        return {"get_delta_weight": delta_weight, "_mixed_batch_forward": mixed_batch}
    if not isinstance(layer, ParamWrapper):
        return {"get_delta_weight": delta_weight}
    return {"get_delta_weight": experts_delta_weight, "get_delta_factors": experts_delta_factors}


def set_start(layer: LoraLayer, adapter: str, start_A: Tensor, start_B: Tensor) -> None:
    """Makes the layer subtract s·B₀A₀ while the adapter is active.

    A₀ [r, in] and B₀ [out, r] are copied to the dtypes and devices of A and B, so that BA − B₀A₀
    is exactly zero if A and B have the same values.
    """
    if not hasattr(layer, BUFFERS[0]):
        for name in BUFFERS:
            # Persistent, because a checkpoint of the whole model must contain them.
            setattr(layer, name, BufferDict(persistent=True))
        # PEFT moves and deletes the attributes in this list.
        layer.other_param_names = (*layer.other_param_names, *BUFFERS)
        for name, function in _deltas(layer).items():
            replace_method(layer, name, function)
        replace_method(layer, "_load_from_state_dict", load_from_state_dict)
    lora_A, lora_B = factors_of(layer, adapter)
    for buffers, factor, like in (
        (layer.lora_start_A, start_A, lora_A),
        (layer.lora_start_B, start_B, lora_B),
    ):
        buffers[adapter] = factor.detach().to(like.device, like.dtype, copy=True)
    layer.lora_variant[adapter] = _variant(layer, adapter)


def _variant(layer: LoraLayer, adapter: str) -> LoraVariant:
    """The variant for an adapter that subtracts a start."""
    is_embedding, is_dora = isinstance(layer, Embedding), magnitude_of(layer, adapter) is not None
    if is_dora:
        return DoraEmbeddingStartVariant() if is_embedding else DoraStartVariant()
    return EmbeddingStartVariant() if is_embedding else StartVariant()


def drop_start(layer: LoraLayer, adapter: str) -> None:
    """Makes the layer subtract nothing for this adapter, and deletes A₀ and B₀ if it has them."""
    if start_of(layer, adapter) is None:
        return
    del layer.lora_start_A[adapter], layer.lora_start_B[adapter]
    if magnitude_of(layer, adapter) is None:
        del layer.lora_variant[adapter]
    else:
        is_embedding = isinstance(layer, Embedding)
        layer.lora_variant[adapter] = (
            DoraEmbeddingVariant() if is_embedding else DoraLinearVariant()
        )
    if len(layer.lora_start_A) == 0:
        for name in BUFFERS:
            delattr(layer, name)
        names = tuple(name for name in layer.other_param_names if name not in BUFFERS)
        del layer.other_param_names  # the instance's attribute, which hides the class's
        if names != layer.other_param_names:
            layer.other_param_names = names
        for name, function in _deltas(layer).items():
            restore_method(layer, name, function)


def load_from_state_dict(
    layer: LoraLayer, state: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
) -> None:
    """Replaces `nn.Module._load_from_state_dict`: A₀ and B₀ follow the A and B that are loaded.

    - If A and B come with A₀ and B₀, the layer subtracts these, even if it subtracted nothing.
    - If A and B come alone, they belong to a plain adapter, and the layer subtracts nothing. It
      warns, because A₀ and B₀ may also have been lost.
    - If A and B are not loaded, or do not fit (which is an error), A₀ and B₀ do not change.
    """
    form = "lora_embedding_%s.%s" if isinstance(layer, Embedding) else "lora_%s.%s.weight"
    loaded = [name for name in adapters_in(layer) if _fit(layer, name, form, state, prefix)]
    if len(loaded) == 1:
        _add_adapter_name(state, prefix, loaded[0])
    for adapter in loaded:
        started = start_of(layer, adapter) is not None
        keys = [f"{prefix}{buffer}.{adapter}" for buffer in BUFFERS]
        if started and state.keys().isdisjoint(keys):
            drop_start(layer, adapter)
            warnings.warn(
                f"{_LOADED_WITHOUT} for adapter {adapter!r}: nothing is subtracted any longer, as "
                "for a plain adapter of PEFT. If these A and B need their initial factors, load "
                f"the complete state_dict, with {' and '.join(BUFFERS)}",
                stacklevel=2,
            )
        elif adapter not in layer.lora_variant and _fit(
            layer, adapter, "lora_start_%s.%s", state, prefix
        ):
            set_start(layer, adapter, *(state[key] for key in keys))
    type(layer)._load_from_state_dict(layer, state, prefix, *args, **kwargs)


@contextmanager
def silently_loaded() -> Iterator[None]:
    """Hides the warning that A and B were loaded without A₀ and B₀: the caller sets these."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_LOADED_WITHOUT)
        yield


def _fit(layer: LoraLayer, adapter: str, form: str, state: dict[str, Any], prefix: str) -> bool:
    """Whether the state has two factors with names like `form`, with the shapes of A and B."""
    return all(
        getattr(state.get(prefix + form % (part, adapter)), "shape", None) == own.shape
        for part, own in zip("AB", factors_of(layer, adapter), strict=True)
    )


def _add_adapter_name(state: dict[str, Any], prefix: str, adapter: str) -> None:
    """Renames A₀ and B₀ for a layer that subtracts nothing yet: PEFT's `set_peft_model_state_dict`
    adds the adapter's name only to names of tensors that the model already has.
    """
    for buffer in BUFFERS:
        if prefix + buffer in state:
            state[f"{prefix}{buffer}.{adapter}"] = state.pop(prefix + buffer)
