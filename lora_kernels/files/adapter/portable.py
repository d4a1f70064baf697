"""The portable form of an adapter, which every loader applies with the right strength, and back.

A' = [RA; RA − A₀] and s·B' = s·[B − B₀, B₀]. Zero rows and columns give all layers one rank r, so
that the configuration needs neither rsLoRA nor patterns: lora_alpha = r. Where the two parts still
cancel, A' and s·B' are computed by an SVD of the update instead.

A, B, A₀ and B₀ are recovered from A' and s·B'. A number is recovered exactly where s is a power of
two and B and B₀ are within a factor of two of each other (Sterbenz). For all other numbers the
recipe has the differences of the bits, about two bits a number; where A' and B' are computed by an
SVD, it has all bits.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...layers.state import FACTORS, LayerState, dst_start
from ..io.buffers import memory_of
from ..io.differences import difference
from .recipe import layer_from_dict, layer_numbers, layer_to_dict, trained_dtype

# A header of the safetensors format has at most 100 MB, including escapes.
_LIMIT = 80_000_000


def padded(factor: Tensor, r: int, dim: int) -> Tensor:
    """The factor with zeros up to rank r. `dim` is the dimension of the rank: 0 for A, 1 for B; −2
    and −1 also for experts' factors.
    """
    missing = r - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def trained_factors(layer: Mapping[str, Any], right: Tensor, left: Tensor) -> dict[str, Tensor]:
    """A and B, and A₀ and B₀ if the layer stores them, in the file's dtype and without the
    differences of bits.

    Args:
        layer: the layer's recipe.
        right: A' [k, in], with or without rows of zeros; for experts [E, k, in].
        left: s·B' [out, k]; for experts [E, out, k].

    Raises:
        ValueError: the recipe is damaged, or the factors have a smaller rank than the recipe says.

    """
    numbers, r, start = layer_numbers(layer), layer["r"], layer.get("start")
    k = 2 * r if start else r
    if right.shape[-2] < k:
        raise ValueError(f"lora_A has {right.shape[-2]} rows, its recipe needs {k}")
    lora_A = right[..., :r, :].clone()
    if layer.get("svd"):  # the recipe has all bits
        found = {"lora_A": torch.zeros_like(lora_A), "lora_B": torch.zeros_like(left[..., :r])}
        if start == "kept":
            found |= {"start_A": found["lora_A"].clone(), "start_B": found["lora_B"].clone()}
        return found
    left = unscaled(left[..., :k], numbers["scaling"])
    if not start:
        return {"lora_A": lora_A, "lora_B": left}
    if start == "dst":
        like = [
            factor.to(trained_dtype(layer, key) or factor.dtype)
            for key, factor in (("lora_A", lora_A), ("lora_B", left[..., :r]))
        ]
        start_B = dst_start(like[0], like[1], numbers["beta"])[1].to(left.dtype)
        return {"lora_A": lora_A, "lora_B": left[..., :r] + start_B}
    start_B = left[..., r:].clone()
    return {
        "lora_A": lora_A,
        "lora_B": left[..., :r] + start_B,
        "start_A": lora_A - right[..., r:k, :],
        "start_B": start_B,
    }


def unscaled(factor: Tensor, scaling: float) -> Tensor:
    """The factor, from s times the factor, rounded once; exact if s is a power of two."""
    return (factor.double() / scaling).to(factor.dtype)


def portable_recipe(layer: LayerState, right: Tensor, left: Tensor) -> dict[str, Any]:
    """The recipe of a layer that is stored as A' and s·B'. `layer_from_dict` restores the layer's
    factors from it to the last bit, except that an R or a λ stays multiplied into A.
    """
    recipe = layer_to_dict(layer) | {"checksum": checksum(right, left)}
    plain, _ = layer.update_factors()
    k = plain.shape[-2]
    if not torch.equal(plain, right[..., :k, :]):
        recipe["svd"] = k
        if layer.middle() is not None:
            product = plain[..., : layer.r, :].to(layer.lora_A.dtype)
            layer = replace(layer, lora_A=product, lora_R=None, lora_diag=None)
    factors = trained_factors(recipe, right, left)
    bias = layer.portable_bias()
    if bias is not None:
        factors["lora_bias"] = unscaled(bias, layer.scaling)
    if layer.lora_magnitude is not None:  # the file has it unchanged
        factors["lora_magnitude"] = layer.lora_magnitude
    back = layer_from_dict(recipe, factors)
    bits = {}
    for key in FACTORS:
        want, got = getattr(layer, key), getattr(back, key)
        folded = key == "lora_A" and layer.middle() is not None
        if want is not None and got is not None and not folded:
            bits[key] = difference(want, got)
    return recipe | with_bits(bits)


def checksum(right: Tensor, left: Tensor) -> int:
    """The checksum of the bytes of A' and s·B' as they are in the file."""
    first = zlib.crc32(str(right.dtype).encode())
    return zlib.crc32(memory_of(left), zlib.crc32(memory_of(right), first))


def with_bits(bits: Mapping[str, str]) -> dict[str, Any]:
    """The entry of a recipe for the differences of factors; {} if there are none."""
    found = {key: text for key, text in bits.items() if text}
    return {"bits": found} if found else {}


def within_header(recipes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The recipes. If a file's header cannot hold the differences of bits, they are dropped with a
    warning.
    """
    size = sum(len(text) for r in recipes.values() for text in r.get("bits", {}).values())
    if size <= _LIMIT:
        return dict(recipes)
    warnings.warn(
        f"{size:,} bytes would be needed to store the trained factors to the last bit, more than "
        "the header of a file holds: training that continues from it begins with rounded factors; "
        "save_adapter(..., format='native') keeps them exactly",
        stacklevel=4,
    )
    return {name: _without_bits(recipe) for name, recipe in recipes.items()}


def _without_bits(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without the differences of bits. A layer that cannot be restored without them
    becomes a plain layer of the rank in the file.
    """
    left = {key: value for key, value in recipe.items() if key != "bits"}
    if "svd" not in left:
        return left
    r = left.pop("svd")
    left.pop("parts", None)
    return left | {"r": r, "scaling": 1.0, "lora_alpha": r, "beta": None, "start": None,
                   "R": False, "dtypes": {}}  # fmt: skip
