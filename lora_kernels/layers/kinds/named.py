"""Layers that are adapted only if they are named: embeddings, convolutions and attentions; and the
reasons why some cannot be adapted.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from ..._utils.checks import FLOATS
from ..._utils.source import definition, undecorated
from .plain import UNCALLED, forward_is_replaced, has_float_weight

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# How forwards of models' subclasses of `nn.Embedding` multiply by a scale: {form: source}.
_SCALES = {
    "number": "return super().forward({}) * self.embed_scale",
    "cast": "return super().forward({}) * self.embed_scale.to(self.weight.dtype)",
}


def lookup_scale(module: nn.Module, cls: type[nn.Module] | None = None) -> str | None:
    """How the forward of an `nn.Embedding` scales the rows that it looks up: "" not at all,
    "number" by `embed_scale`, "cast" by `embed_scale` in the weight's dtype; None if it computes
    something else. `cls` is the module's former class, if that was another one.
    """
    own: Any = cls or type(module)  # type checkers see no Hashable, by nn.Module's annotations
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


def why_not_named(module: nn.Module) -> str | None:
    """Why a layer of a kind that must be named cannot be adapted; None if it can be, or if the
    layer is of another kind.
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


def why_not_embedding(module: nn.Embedding) -> str | None:
    """Why an embedding cannot be adapted; None if it can."""
    kind = type(module).__name__
    if is_parametrized(module) or not has_float_weight(module):
        return "its weight is computed or not of a floating-point type"
    if len(module._parameters) != 1 or module._modules:
        return f"{kind} has other parts than a weight"
    if lookup_scale(module) is None:
        return f"{kind} does not compute as nn.Embedding does"
    if forward_is_replaced(module):
        return "its forward is replaced; undo that first"
    if module.max_norm is not None:
        return "max_norm rewrites its weight in every forward"
    return None


def why_not_convolution(module: nn.Module) -> str | None:
    """Why a convolution cannot be adapted; None if it can."""
    cls: Any = type(module)
    usual: Any = next(base for base in CONVOLUTIONS if isinstance(module, base))
    if isinstance(module._parameters.get("weight"), UninitializedParameter):
        return "its weight has no shape yet; run the model once"
    if is_parametrized(module) or not has_float_weight(module):
        return "its weight is computed or not of a floating-point type"
    if module._parameters.keys() != {"weight", "bias"} or module._modules:
        return f"{cls.__name__} has other parts than a weight and a bias"
    if cls.forward is not usual.forward or cls._conv_forward is not usual._conv_forward:
        return f"{cls.__name__} does not compute as nn.{usual.__name__} does"
    if forward_is_replaced(module):
        return "its forward is replaced; undo that first"
    return None


def why_not_attention(module: nn.MultiheadAttention) -> str | None:
    """Why an attention cannot be adapted; None if it can."""
    cls, out_proj = type(module), module._modules.get("out_proj")
    if cls.forward is not nn.MultiheadAttention.forward:
        return f"{cls.__name__} does not compute as nn.MultiheadAttention does"
    if forward_is_replaced(module):
        return "its forward is replaced; undo that first"
    if not module._qkv_same_embed_dim:
        return "its queries, keys and values have different sizes (kdim, vdim)"
    weight = module._parameters.get("in_proj_weight")
    if is_parametrized(module) or weight is None or weight.dtype not in FLOATS:
        return "its in_proj_weight is computed or not of a floating-point type"
    if out_proj is None or not is_out_projection(out_proj):
        return "its out_proj is replaced, or has no floating-point weight of its own"
    return None


def is_out_projection(module: nn.Module) -> bool:
    """Whether this is the `out_proj` of an `nn.MultiheadAttention`, with a weight of its own."""
    return type(module) in UNCALLED and has_float_weight(module)
