"""A layer's update as it was trained, by the rules of the program that wrote it: two factors and s.
And how far another update is from it.

PEFT's rules: s = α / r, or α / √r with `use_rslora`; `rank_pattern` and `alpha_pattern` may give a
layer its own r and α. diffusers' rules: PEFT's options in the file's header, or else s = α / r with
the α in the file, or else s = 1. The update of a linear layer is s·B·A; an embedding's update is
the transpose of s·B·A; a convolution's update is that of its flattened kernel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._utils.names import pattern_matches
from ..adapter.compression import product_norm
from ..adapter.peft_format.experts.reading import targeted_parameters
from .stored import PEFT, StoredAdapter, StoredLayer, plain_name, selected_name

_DEFAULT_R, _DEFAULT_ALPHA = 8, 8  # of PEFT's LoraConfig


@dataclass(frozen=True)
class Update:
    """scale · left · right.

    Attributes:
        right: [..., k, in].
        left: [..., out, k]. Leading dimensions are experts.
        scale: s.

    """

    right: Tensor
    left: Tensor
    scale: float

    def norm(self) -> float:
        """‖scale · left · right‖_F, in float64."""
        return abs(self.scale) * product_norm(self.right, self.left)


def relative_error(got: Update, want: Update) -> float:
    """‖got − want‖_F / ‖want‖_F; 0 if both are 0; infinite if only `want` is 0, or a factor is not
    finite.

    Factors that cancel to a small update lose no digits (see `product_norm`).
    """
    if got.right is want.right and got.left is want.left:
        return _error_of_scale(got, want)
    right = torch.cat([got.right.double(), want.right.double()], dim=-2)
    left = torch.cat([got.scale * got.left.double(), -want.scale * want.left.double()], dim=-1)
    if not (right.isfinite().all() and left.isfinite().all()):
        return math.inf
    difference, size = product_norm(right, left), want.norm()
    # Two equal updates may differ by roundings, and may be sums of much larger terms.
    noise = 64 * torch.finfo(torch.float64).eps * float(left.norm()) * float(right.norm())
    if difference <= noise:
        return 0.0
    return difference / size if size > 0 else math.inf


def _error_of_scale(got: Update, want: Update) -> float:
    """The error if only the scales differ."""
    if not (want.right.isfinite().all() and want.left.isfinite().all()):
        return math.inf
    if got.scale == want.scale:
        return 0.0
    if want.scale == 0:
        return math.inf if got.norm() > 0 else 0.0
    return abs(got.scale / want.scale - 1) if want.norm() > 0 else 0.0


def trained_scale(adapter: StoredAdapter, layer: StoredLayer) -> float:
    """The layer's s.

    Raises:
        ValueError: an option that s depends on is not a number.

    """
    options = options_of(adapter, layer)
    if options is None:
        return alpha_of(layer, float(layer.rank)) / layer.rank
    return scale_of(options, option_name(options, layer))


def trained_update(adapter: StoredAdapter, layer: StoredLayer) -> Update:
    """The layer's update as trained, in the file's dtype.

    Raises:
        ValueError: see `trained_scale`; or the tensors have another rank than the options say.

    """
    right, left = factors_of(adapter, layer)
    return Update(right, left, trained_scale(adapter, layer))


def factors_of(adapter: StoredAdapter, layer: StoredLayer) -> tuple[Tensor, Tensor]:
    """A [..., r, in] and B [..., out, r]; for each expert if one tensor holds all experts."""
    right, left = layer.right.load().flatten(1), layer.left.load().flatten(1)
    experts = experts_of(adapter, layer)
    if experts > 1:
        # PEFT's layout: the expert varies slowest in A's rows, fastest in B's columns.
        right = right.reshape(experts, -1, right.shape[-1])
        left = left.reshape(left.shape[0], -1, experts).permute(2, 0, 1)
    return right, left


def experts_of(adapter: StoredAdapter, layer: StoredLayer) -> int:
    """The number of experts that a layer's tensors hold; 1 for a linear layer.

    Raises:
        ValueError: the tensors' rank is not a multiple of r.

    """
    options = options_of(adapter, layer)
    name = parameter_of(options or {}, layer)
    if name is None:
        return 1
    r = rank_of(options or {}, name)
    if layer.rank % r:
        raise ValueError(
            f"lora_A of {layer.name!r} has {layer.rank} rows, which is not a multiple of r = {r}: "
            "the configuration belongs to another adapter"
        )
    return layer.rank // r


def rank_per_expert(adapter: StoredAdapter, layer: StoredLayer) -> int:
    """The rank of a layer's update, or of one expert's."""
    return layer.rank // experts_of(adapter, layer)


def options_of(adapter: StoredAdapter, layer: StoredLayer) -> Mapping[str, Any] | None:
    """PEFT's options for a layer; None if the file has none, as many diffusers files."""
    if adapter.kind == PEFT:
        return adapter.config
    if adapter.components is None:
        return None
    return adapter.components.get(layer.component, adapter.components.get(""))


def alpha_of(layer: StoredLayer, default: float) -> float:
    """The α that is stored as a tensor."""
    return default if layer.alpha is None else float(layer.alpha.load().double())


def option_name(options: Mapping[str, Any], layer: StoredLayer) -> str:
    """The name that PEFT matches with patterns: the module's or the parameter's name."""
    name = selected_name(layer.name)
    if layer.component and name.startswith(f"{layer.component}."):
        name = name.removeprefix(f"{layer.component}.")
    return parameter_of(options, layer) or name


def parameter_of(options: Mapping[str, Any], layer: StoredLayer) -> str | None:
    """The name of the parameter that is adapted (PEFT's `target_parameters`); None if the layer is
    a module.

    PEFT wraps a module once for each adapted parameter. Without targets, experts have the names
    that vLLM gives them: "experts.base_layer" is gate_up_proj, "experts" is down_proj.
    """
    targets = options.get("target_parameters") or ()
    if isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"target_parameters = {targets!r} is not a list of names")
    module = plain_name(layer.name)
    depth = (len(layer.name) - len(module)) // len(".base_layer")
    own = targeted_parameters(module, targets)
    if not own and module.endswith(".experts"):
        own = ["gate_up_proj", "down_proj"]
    if not own or depth >= len(own):
        return None
    return f"{module}.{own[len(own) - 1 - depth]}"


def scale_of(options: Mapping[str, Any], name: str) -> float:
    """s of the layer or parameter with this name."""
    r, alpha = rank_of(options, name), number(options, "lora_alpha", _DEFAULT_ALPHA)
    own = pattern_value(options, "alpha_pattern", name)
    alpha = alpha if own is None else own
    return alpha / (math.sqrt(r) if options.get("use_rslora") else r)


def rank_of(options: Mapping[str, Any], name: str) -> int:
    """r of the layer or parameter with this name."""
    own = pattern_value(options, "rank_pattern", name)
    r = number(options, "r", _DEFAULT_R) if own is None else own
    if r < 1 or r != int(r):
        raise ValueError(f"r = {r!r} of {name!r} is not a positive whole number")
    return int(r)


def pattern_value(options: Mapping[str, Any], option: str, name: str) -> float | None:
    """The value of the first pattern that matches; None if none does."""
    patterns = options.get(option) or {}
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{option} = {patterns!r} is not an object of patterns and numbers")
    for pattern in patterns:
        try:
            matches = pattern_matches(pattern, name)
        except re.error as error:
            raise ValueError(
                f"{option} has {pattern!r}, not a regular expression: {error}"
            ) from None
        if matches:
            return number(patterns, pattern, None)
    return None


def saved_modules(options: Mapping[str, Any]) -> tuple[str, ...]:
    """The entries of `modules_to_save`; a single name is one entry."""
    saved = options.get("modules_to_save") or ()
    return (saved,) if isinstance(saved, str) else tuple(str(name) for name in saved)


def number(options: Mapping[str, Any], option: str, default: float | None) -> float:
    """A number of the configuration; the default if it is missing or null, although some engines
    refuse that (`refuse_missing`).

    Raises:
        ValueError: the value is not a number.

    """
    value = options.get(option)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{option} = {value!r} is not a number")
    return value
