"""The kind of a layer that can be adapted, found without importing the package that defines it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..._utils.checks import FLOATS
from ...init.sharded.layout import is_flattened, is_sharded
from .named import (
    CONVOLUTIONS,
    is_out_projection,
    lookup_scale,
    why_not_attention,
    why_not_convolution,
    why_not_embedding,
    why_not_named,
)
from .plain import (
    forward_is_replaced,
    has_float_weight,
    is_conv1d,
    is_flattened_layer,
    is_parallel_forward,
    is_plain,
    why_not_plain,
)

__all__ = [
    "ATTENTION",
    "CONVOLUTION",
    "CONVOLUTIONS",
    "EMBEDDING",
    "FLOAT8",
    "FLOAT_KINDS",
    "NAMED_KINDS",
    "OUT_PROJECTION",
    "ForeignLayer",
    "check_adaptable",
    "is_conv1d",
    "is_parallel_forward",
    "kind_of",
    "lookup_scale",
    "refuse_sharded",
    "why_not_attention",
    "why_not_convolution",
    "why_not_embedding",
    "why_not_named",
]

FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
EMBEDDING, CONVOLUTION = "embedding", "conv"
ATTENTION, OUT_PROJECTION = "attention", "attention_out"
# Kinds of layers that are adapted only if they are named; for OUT_PROJECTION, its attention is.
NAMED_KINDS = (EMBEDDING, CONVOLUTION, ATTENTION, OUT_PROJECTION)
FLOAT_KINDS = ("linear", "conv1d", *NAMED_KINDS)  # the kinds whose weight can be rewritten
# A layer that another package defines, perhaps without type annotations.
ForeignLayer: TypeAlias = Any


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer without adapters; None if the module cannot be adapted.

    - "linear": an `nn.Linear` with the usual forward and a floating-point weight of its own
      (float64, float32, bfloat16 or float16).
    - "conv1d": GPT-2's `Conv1D`, whose weight is [in, out].
    - "embedding": an `nn.Embedding` with the usual forward, perhaps times a scale, and a
      floating-point weight of its own; the matrix [out, in] is the transposed weight.
    - "conv": an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with the usual forward and a floating-point
      weight of its own; the matrix is the weight, flattened from the second dimension on.
    - "attention": an `nn.MultiheadAttention` whose queries, keys and values have one size; the
      matrix is `in_proj_weight`. "attention_out": its `out_proj`.
    - "bnb_4bit", "bnb_8bit": bitsandbytes' `Linear4bit` and `Linear8bitLt`.
    - "torchao": an `nn.Linear` whose weight is one of torchao's tensors.
    - "float8": an `nn.Linear` or `Conv1D` whose weight is stored in float8; something, such as a
      hook, casts it for every forward.
    - "forward": any other layer with integers `in_features` and `out_features`, no floating-point
      weight, and a tensor of codes: GPTQ's, AWQ's, HQQ's.

    A sharded weight does not change the kind: see `refuse_sharded`.
    """
    if isinstance(module, torch.jit.ScriptModule):  # its parameters are not those of Python
        return None
    return next((kind for kind, matches in _KINDS.items() if matches(module)), None)


def check_adaptable(linear: nn.Module) -> None:
    """Raises TypeError, with the reason, unless the module is of the kind "linear"."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"from_linear takes an nn.Linear, got {type(linear).__name__}")
    reason = why_not_plain(linear)
    if reason is None and not isinstance(linear.weight, nn.Parameter):
        reason = "the weight is computed; remove its parametrization first"
    if reason is None and kind_of(linear) == "torchao":
        reason = f"the weight is a {type(linear.weight).__name__}: add_lora adapts quantized layers"
    if reason is not None:
        raise TypeError(reason)


def refuse_sharded(name: str, module: nn.Module, rewritable: bool | None = None) -> None:
    """Raises ValueError if the layer `name` has tensors that are not loaded, or sharded in a way
    that adapters do not support. `rewritable` says whether its weights are floating-point tensors,
    if that is known.
    """
    if rewritable is None:
        rewritable = kind_of(module) in FLOAT_KINDS
    for key, tensor in _tensors(module):
        what = f"{name}.{key}"
        if is_flattened(tensor) or is_flattened_layer(module):
            raise ValueError(
                f"{what} is part of a flat parameter of FSDP: adapt the model before it is wrapped"
            )
        if hasattr(tensor, "ds_id") and not tensor.numel() and not is_sharded(tensor):
            raise ValueError(
                f"{what} is partitioned by DeepSpeed ZeRO-3: adapt the model before "
                "deepspeed.initialize, or within deepspeed.zero.GatheredParameters (this version "
                "of DeepSpeed does not keep the partition in ds_tensor)"
            )
        if is_sharded(tensor) and not rewritable:
            raise ValueError(
                f"{what} is a part of a quantized weight, which is sharded: adapt the model before "
                "it is sharded"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{what} is on the meta device: load it first (if accelerate has offloaded it, "
                "load the model with a device_map that keeps this layer)"
            )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = {**module._parameters, **module._buffers}
    if is_flattened_layer(module):
        own["weight"] = vars(module)["weight"]
    return [(name, tensor) for name, tensor in own.items() if tensor is not None]


def _is_a(module: object, package: str, *names: str) -> bool:
    """Whether the module's class derives from a class of that package, with one of `names` if any
    are given.
    """
    return any(
        cls.__module__.partition(".")[0] == package and (not names or cls.__name__ in names)
        for cls in type(module).__mro__
    )


def _is_float8(module: nn.Module) -> bool:
    """Whether W is a float8 Parameter. The hooks of diffusers replace the layer's forward."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in FLOAT8:
        return False
    hooked = type(module).forward is nn.Linear.forward and hasattr(module, "_diffusers_hook")
    usual = is_conv1d(module) and not forward_is_replaced(module)
    return hooked or usual or is_plain(module)


def _is_forward_only(module: nn.Module) -> bool:
    sizes = [getattr(module, size, None) for size in ("in_features", "out_features")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in FLOATS:
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not any(tensor.dim() >= 2 and tensor.dtype not in FLOATS for tensor in own):
        return False
    # A wrapper around a layer, such as PEFT's, or a block of layers is not a linear layer itself.
    return not any(kind_of(part) for part in module.modules() if part is not module)


# The first predicate that is true gives the kind.
_KINDS: dict[str, Callable[[nn.Module], bool]] = {
    "bnb_4bit": lambda m: _is_a(m, "bitsandbytes", "Linear4bit"),
    "bnb_8bit": lambda m: _is_a(m, "bitsandbytes", "Linear8bitLt"),
    "conv1d": lambda m: is_conv1d(m) and has_float_weight(m) and not forward_is_replaced(m),
    "linear": lambda m: is_plain(m) and has_float_weight(m),
    EMBEDDING: lambda m: isinstance(m, nn.Embedding) and why_not_embedding(m) is None,
    CONVOLUTION: lambda m: isinstance(m, CONVOLUTIONS) and why_not_convolution(m) is None,
    ATTENTION: lambda m: isinstance(m, nn.MultiheadAttention) and why_not_attention(m) is None,
    OUT_PROJECTION: is_out_projection,
    "torchao": lambda m: is_plain(m) and _is_a(m.weight, "torchao"),
    "float8": _is_float8,
    "forward": _is_forward_only,
}
