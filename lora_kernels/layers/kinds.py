"""The kind of a layer that can be adapted, found without importing the package that defines it."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from .._utils.checks import FLOATS
from .._utils.source import definition, undecorated
from ..init.sharded.layout import is_dtensor, is_flattened, is_sharded

FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
EMBEDDING, CONVOLUTION = "embedding", "conv"
ATTENTION, OUT_PROJECTION = "attention", "attention_out"
# Kinds of layers that are adapted only if they, or of OUT_PROJECTION its attention, are named.
NAMED_KINDS = (EMBEDDING, CONVOLUTION, ATTENTION, OUT_PROJECTION)
FLOAT_KINDS = ("linear", "conv1d", *NAMED_KINDS)  # the kinds whose weight can be rewritten
CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# The forwards of models' subclasses of `nn.Embedding` that multiply by a scale, by their forms.
_SCALES = {
    "number": "return super().forward({}) * self.embed_scale",
    "cast": "return super().forward({}) * self.embed_scale.to(self.weight.dtype)",
}

# The class of nn.MultiheadAttention's out_proj, whose forward is never called.
_UNCALLED = (NonDynamicallyQuantizableLinear,)

# A layer that another package defines, perhaps without types.
ForeignLayer: TypeAlias = Any


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer without adapters; None if the module cannot be adapted.

    - "linear": an `nn.Linear` with the usual forward and a floating-point weight of its own
      (float64, float32, bfloat16 or float16).
    - "conv1d": GPT-2's `Conv1D`, whose weight is [in, out].
    - "embedding": an `nn.Embedding` with the usual forward, perhaps times a scale, and a
      floating-point weight of its own; as a matrix [out, in] it is the transposed weight.
    - "conv": an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with the usual forward and a floating-point
      weight of its own; as a matrix it is the weight, flattened from the second dimension on.
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
    return next((kind for kind, matches in _KINDS.items() if matches(module)), None)


def is_conv1d(module: object) -> bool:
    """Whether the module is GPT-2's `Conv1D`, a linear layer whose weight is [in, out]."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def check_adaptable(linear: nn.Module) -> None:
    """Raises TypeError, with the reason, unless the module is of the kind "linear"."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"from_linear takes an nn.Linear, got {type(linear).__name__}")
    reason = _why_not_plain(linear)
    if reason is None and not isinstance(linear.weight, nn.Parameter):
        reason = "the weight is computed; remove its parametrization first"
    if reason is None and kind_of(linear) == "torchao":
        reason = f"the weight is a {type(linear.weight).__name__}: add_lora adapts quantized layers"
    if reason is not None:
        raise TypeError(reason)


def lookup_scale(module: nn.Module, cls: type[nn.Module] | None = None) -> str | None:
    """How the forward of an `nn.Embedding` scales the rows that it looks up: "" not at all,
    "number" by `embed_scale`, "cast" by `embed_scale` in the weight's dtype; None if it computes
    something else. `cls` is the module's class, if it has had another one.
    """
    own: Any = cls or type(module)  # nn.Module's annotations make it no Hashable for type checkers
    form = _form_of(own)
    if not form:
        return form
    scale: object = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor):
        return form if scale.numel() == 1 else None
    return form if form == "number" and isinstance(scale, (int, float)) else None


@lru_cache(maxsize=1024)
def _form_of(cls: type[nn.Module]) -> str | None:
    """`lookup_scale` of a class, by its source."""
    if cls.forward is nn.Embedding.forward:
        return ""
    places = [index for index, base in enumerate(cls.__mro__) if "forward" in vars(base)]
    is_next = len(places) > 1 and cls.__mro__[places[1]] is nn.Embedding
    function = undecorated(cls.forward) if is_next else None
    found = None if function is None else definition(function)
    if found is None or len(found[1].args.args) != 2:
        return None
    node = found[1]
    body = node.body[1:] if ast.get_docstring(node) else node.body
    text = "\n".join(ast.unparse(part) for part in body)
    given = node.args.args[1].arg
    return next((form for form, spelt in _SCALES.items() if text == spelt.format(given)), None)


def why_not_embedding(module: nn.Embedding) -> str | None:
    """Why an embedding cannot be adapted; None if it can."""
    kind = type(module).__name__
    if is_parametrized(module) or not _has_float_weight(module):
        return "its weight is computed or not of a floating-point type"
    if len(module._parameters) != 1 or module._modules:
        return f"{kind} has other parts than a weight"
    if lookup_scale(module) is None:
        return f"{kind} does not compute as nn.Embedding does"
    if _forward_is_replaced(module):
        return "its forward is replaced; undo that first"
    if module.max_norm is not None:
        return "max_norm rewrites its weight in every forward"
    return None


def why_not_named(module: nn.Module) -> str | None:
    """Why a layer of the kinds that must be named cannot be adapted; None if it can, or if it is of
    another kind.
    """
    if isinstance(module, nn.Embedding):
        return why_not_embedding(module)
    if isinstance(module, CONVOLUTIONS):
        return why_not_convolution(module)
    if isinstance(module, nn.MultiheadAttention):
        return why_not_attention(module)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return "it is a transposed convolution, for which there is no adapter"
    return None


def why_not_convolution(module: nn.Module) -> str | None:
    """Why a convolution cannot be adapted; None if it can."""
    cls: Any = type(module)
    usual: Any = next(base for base in CONVOLUTIONS if isinstance(module, base))
    if isinstance(module._parameters.get("weight"), UninitializedParameter):
        return "its weight has no shape yet; run the model once"
    if is_parametrized(module) or not _has_float_weight(module):
        return "its weight is computed or not of a floating-point type"
    if module._parameters.keys() != {"weight", "bias"} or module._modules:
        return f"{cls.__name__} has other parts than a weight and a bias"
    if cls.forward is not usual.forward or cls._conv_forward is not usual._conv_forward:
        return f"{cls.__name__} does not compute as nn.{usual.__name__} does"
    if _forward_is_replaced(module):
        return "its forward is replaced; undo that first"
    return None


def why_not_attention(module: nn.MultiheadAttention) -> str | None:
    """Why an attention cannot be adapted; None if it can."""
    cls, out_proj = type(module), module._modules.get("out_proj")
    if cls.forward is not nn.MultiheadAttention.forward:
        return f"{cls.__name__} does not compute as nn.MultiheadAttention does"
    if _forward_is_replaced(module):
        return "its forward is replaced; undo that first"
    if not module._qkv_same_embed_dim:
        return "its queries, keys and values have different sizes (kdim, vdim)"
    weight = module._parameters.get("in_proj_weight")
    if is_parametrized(module) or weight is None or weight.dtype not in FLOATS:
        return "its in_proj_weight is computed or not of a floating-point type"
    if out_proj is None or kind_of(out_proj) != OUT_PROJECTION:
        return "its out_proj is replaced, or has no floating-point weight of its own"
    return None


def refuse_sharded(name: str, module: nn.Module, rewritable: bool | None = None) -> None:
    """Raises ValueError if the layer `name` has tensors that are not loaded, or sharded in a way in
    which it cannot be adapted. `rewritable`: whether its weights are floating-point ones, if that
    is known.
    """
    if rewritable is None:
        rewritable = kind_of(module) in FLOAT_KINDS
    for key, tensor in _tensors(module):
        what = f"{name}.{key}"
        if is_flattened(tensor) or _is_flattened(module):
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
                f"{what} is a part of a quantised weight, which is sharded: adapt the model before "
                "it is sharded"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{what} is on the meta device: load it first (if accelerate has offloaded it, "
                "load the model with a device_map that keeps this layer)"
            )


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = {**module._parameters, **module._buffers}
    if _is_flattened(module):
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


def _has_float_weight(module: nn.Module) -> bool:
    """Whether the weight is a floating-point Parameter, sharded or not, and neither the weight nor
    the bias is a computed tensor (parametrized, hooked).
    """
    weight = module._parameters.get("weight")
    if weight is None:
        return _is_flattened(module)
    if isinstance(vars(module).get("bias"), Tensor):
        return False
    return weight.dtype in FLOATS and (type(weight) is nn.Parameter or is_dtensor(weight))


def _is_float8(module: nn.Module) -> bool:
    """Whether W is a float8 Parameter. The hooks of diffusers replace the layer's forward."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dtype not in FLOAT8:
        return False
    hooked = type(module).forward is nn.Linear.forward and hasattr(module, "_diffusers_hook")
    usual = is_conv1d(module) and not _forward_is_replaced(module)
    return hooked or usual or _is_plain(module)


def _is_flattened(module: nn.Module) -> bool:
    """Whether FSDP has replaced all Parameters by views of a flat one; weight_norm and pruning
    replace only some of them.
    """
    return (
        (_is_plain(module) or is_conv1d(module) or isinstance(module, nn.Embedding))
        and isinstance(vars(module).get("weight"), Tensor)
        and all(parameter is None for parameter in module._parameters.values())
    )


def _is_plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and _why_not_plain(module) is None


def _why_not_plain(linear: nn.Linear) -> str | None:
    """Why the layer does not compute x Wᵀ + b with parameters of its own; None if it does."""
    kind = type(linear)
    # transformers' FalconLinear computes x Wᵀ + b in two steps.
    falcon = kind.__name__ == "FalconLinear" and kind.__module__.startswith("transformers.")
    uncalled = isinstance(linear, _UNCALLED)
    if (kind.forward is not nn.Linear.forward and not falcon) or uncalled:
        return f"{kind.__name__} does not compute as nn.Linear does"
    if _forward_is_replaced(linear):
        return "the forward of this nn.Linear is replaced; undo that first"
    if is_parametrized(linear):  # the weight or the bias
        return "the weight is computed; remove its parametrization first"
    return None


def _forward_is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own, other than those that call the forward of the
    class: accelerate's hook, and transformers' tensor parallelism.
    """
    own = vars(module).get("forward")
    return own is not None and not hasattr(module, "_hf_hook") and not is_parallel_forward(own)


def is_parallel_forward(forward: object) -> bool:
    """Whether this is what transformers' tensor parallelism puts around a module's forward."""
    origin, name = (getattr(forward, key, "") for key in ("__module__", "__qualname__"))
    # accelerate's hook around it is a `functools.partial` of the same name.
    is_own = isinstance(forward, FunctionType) and name.endswith(".tp_forward")
    return is_own and origin.startswith("transformers.")


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
    "conv1d": lambda m: is_conv1d(m) and _has_float_weight(m) and not _forward_is_replaced(m),
    "linear": lambda m: _is_plain(m) and _has_float_weight(m),
    EMBEDDING: lambda m: isinstance(m, nn.Embedding) and why_not_embedding(m) is None,
    CONVOLUTION: lambda m: isinstance(m, CONVOLUTIONS) and why_not_convolution(m) is None,
    ATTENTION: lambda m: isinstance(m, nn.MultiheadAttention) and why_not_attention(m) is None,
    OUT_PROJECTION: lambda m: type(m) in _UNCALLED and _has_float_weight(m),
    "torchao": lambda m: _is_plain(m) and _is_a(m.weight, "torchao"),
    "float8": _is_float8,
    "forward": _is_forward_only,
}
