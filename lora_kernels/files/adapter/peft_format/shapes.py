"""PEFT's names and shapes of the factors of convolutions and attentions, and this package's.

Convolution: PEFT's A [r, in, k ...] and B [out, r, 1 ...] are ours with the kernel's dimensions.
With g `groups`, PEFT's A sees the channels of all groups, and its B [out, r / g, 1 ...] keeps the
groups apart; we have one A [r, in / g · k ...] for every group. Our adapter is therefore PEFT's
adapter of rank g · r with a block-diagonal A, which is zero for the channels of other groups. If
PEFT's A has other values there, it is no update of the layer's weight.

Attention: PEFT's layer `attn` holds A and B of `in_proj_weight`; A and B of `out_proj` are named
`attn.base_layer.out_proj`. PEFT up to 0.21.2 adds the update of `out_proj` twice (pull request
3774 of PEFT), so that the file holds half of our B.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...._utils.peft_names import factor_keys
from ...._utils.safetensors import DTYPES
from ....layers.state import LayerState
from .magnitudes import magnitude_key

Pair = tuple[Tensor, Tensor]
# How often PEFT adds the update of an attention's out_proj, and the last version known to do so.
TWICE, LAST_TWICE = 2, "0.21.2"
_INSIDE = ".base_layer."


class Geometry(NamedTuple):
    """The sizes of a convolution's kernel, and the number of its groups."""

    kernel: tuple[int, ...] = ()
    groups: int = 1


def attention_of(name: str, layers: Collection[str]) -> str | None:
    """The attention whose `out_proj` is the layer `name`; None for other layers. No other kind of
    adapted layer contains another one.
    """
    owner = name.rpartition(".")[0]
    return owner if owner in layers else None


def name_in_file(name: str, layers: Collection[str]) -> str:
    """The name in PEFT's file of a layer with our name `name`."""
    owner = attention_of(name, layers)
    return name if owner is None else f"{owner}{_INSIDE}{name.rpartition('.')[2]}"


def own_name(name: str, layers: Collection[str]) -> str:
    """Our name of the layer that PEFT's file calls `name`; `layers` are all layers of the file."""
    owner, inside, last = name.rpartition(_INSIDE)
    return f"{owner}.{last}" if inside and owner in layers and "." not in last else name


def geometry(name: str, pair: Pair) -> Geometry:
    """The geometry of a layer in a file; its kernel is empty if the layer is no convolution.
    Experts' parameters are not allowed.

    Raises:
        ValueError: the shapes are not a convolution's, or do not fit each other.

    """
    right, left = pair
    if right.dim() < 3 or right.dim() != left.dim():
        return Geometry()
    shapes = f"lora_A {list(right.shape)} and lora_B {list(left.shape)} of {name!r}"
    if right.dim() > 5 or left.shape[2:].numel() != 1:
        raise ValueError(f"{shapes} are not those of a convolution")
    groups, rest = divmod(len(right), max(1, left.shape[1]))
    if rest or not groups or right.shape[1] % groups or len(left) % groups:
        raise ValueError(f"{shapes} do not fit each other; expected [r, in ...] and [out, r ...]")
    return Geometry(tuple(right.shape[2:]), groups)


def file_rank(layer: LayerState, r: int) -> int:
    """The rank in PEFT's file of a layer whose factors have rank r here."""
    return r * layer.groups


def to_file(layer: LayerState, pair: Pair, of_attention: bool = False) -> Pair:
    """A layer's A and B in PEFT's shapes. `of_attention`: the layer is the `out_proj` of one."""
    right, left = pair
    if of_attention:
        return right, left / TWICE
    if not layer.kernel:
        return pair
    ones = (1,) * len(layer.kernel)
    right = right.reshape(len(right), -1, *layer.kernel)  # [k, in / groups, ...]
    if layer.groups > 1:
        rank, channels, *_ = right.shape
        blocks = right.new_zeros(layer.groups, rank, layer.groups, channels, *layer.kernel)
        for group in range(layer.groups):
            blocks[group, :, group] = right
        right = blocks.flatten(2, 3).flatten(0, 1)
    return right, left.reshape(*left.shape, *ones)


def from_file(name: str, pair: Pair, of_attention: bool = False) -> Pair:
    """The inverse of `to_file`, except for experts' parameters.

    Raises:
        ValueError: see `geometry`; or our A and B cannot express a convolution with groups.

    """
    right, left = pair
    if of_attention:
        return right, left * TWICE
    found = geometry(name, pair)
    if not found.kernel:
        return pair
    if found.groups > 1:
        right = _of_one_group(name, right, found.groups)
    return right.flatten(1), left.flatten(1)


def _of_one_group(name: str, right: Tensor, groups: int) -> Tensor:
    """The A [r, in / groups, ...] that every group has, from PEFT's [groups · r, in, ...]."""
    blocks = right.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))  # [g, r, g, in / g, ...]
    first = blocks[0, :, 0]
    expected = torch.zeros_like(blocks)
    for group in range(groups):
        expected[group, :, group] = first
    if not torch.equal(blocks, expected):
        raise ValueError(
            f"{name!r} is a convolution with {groups} groups, and PEFT's lora_A multiplies the "
            "channels of other groups too: this is no update of the layer's weight, which PEFT "
            "cannot merge either; leave the layer out (exclude_modules), or train it here"
        )
    return first


def flattened(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """A file's pairs with our names and our shapes; experts' pairs are returned as they are."""
    found = {}
    for name, pair in pairs.items():
        own = own_name(name, pairs)
        found[own] = from_file(own, pair, own != name)
    return found


def of_peft_model(recipe: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The recipe of an adapter that `lora_kernels.peft` saved, adjusted to this package: attentions
    as they are here, and convolutions without groups among the layers that are read.
    """
    found, others = {}, dict(recipe.get("others", {}))
    for name, layer in recipe["layers"].items():
        own = own_name(name, recipe["layers"])
        found[own] = layer if own == name else _added_twice(layer)
    for name, other in recipe.get("others", {}).items():
        pair = [tensors.get(key) for key in factor_keys(name, ())]
        if pair[0] is None or pair[1] is None or "dtypes" not in other:
            continue
        kernel, groups = geometry(name, (pair[0], pair[1]))
        if kernel and groups == 1:
            found[name] = _convolution(others.pop(name), kernel, recipe["rank_fields"])
            if magnitude_key(name) in tensors:
                found[name]["magnitude"] = True
    return {**recipe, "layers": found, "others": others}


def _added_twice(layer: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of an attention's `out_proj`, whose update PEFT adds twice. The checksum is
    dropped: it belongs to half of the B that `from_file` returns.
    """
    doubled = {key: TWICE * layer[key] for key in ("scaling", "lora_alpha")}
    return {key: value for key, value in layer.items() if key != "checksum"} | doubled


def _convolution(
    other: Mapping[str, Any], kernel: tuple[int, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe of a convolution, from what `lora_kernels.peft` stores for it."""
    r, scaling = other["r"], other["scaling"]
    dtypes = {key: str(DTYPES[name]) for key, name in other["dtypes"].items()}
    return {
        "r": r,
        "scaling": scaling,
        "lora_alpha": scaling * (math.sqrt(r) if options.get("use_rslora") else r),
        "residual": "implicit",
        "start": None,
        "R": False,
        "kernel": list(kernel),
        "bias": "lora_bias" in dtypes,
        "dtypes": {key: dtype.removeprefix("torch.") for key, dtype in dtypes.items()},
        "bits": other.get("bits", {}),
    }


def own_names(named: Mapping[str, Any], layers: Collection[str]) -> dict[str, Any]:
    """What a file stores for its layers, by our names instead of the file's."""
    return {own_name(name, layers): value for name, value in named.items()}


def own_tensors(tensors: Mapping[str, Tensor], layers: Collection[str]) -> dict[str, Tensor]:
    """The base's tensors in a file by our names, which begin with our names of the layers."""
    found = {}
    for key, tensor in tensors.items():
        owner, dot, last = key.rpartition(".")
        found[f"{own_name(owner, layers)}{dot}{last}"] = tensor
    return found
