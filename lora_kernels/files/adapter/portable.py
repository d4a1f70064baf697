"""The portable form of an adapter, and back: every loader applies it with the right strength.

A' = [RA; RA − A₀] and s·B' = s·[B − B₀, B₀], with zero rows and columns up to one rank for all
layers, so that the configuration needs no rsLoRA, no patterns, and lora_alpha = r. A, B, A₀ and B₀
are computed from them exactly where no bit was lost: s is a power of two, and B and B₀ are within a
factor of two of each other (Sterbenz). The trained factors of other layers are kept in a file
beside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._utils.safetensors import dtype_name
from ...layers.state import FACTORS, LayerState, dst_start
from ...model.config import AdapterState
from .recipe import layer_from_dict, layer_to_dict, narrow_dtype

# Not *.safetensors, *.bin or *.pt: SGLang and Ollama read all files with such names in a folder.
TRAINING_FILE = "adapter_training.tensors"


def padded(factor: Tensor, r: int, dim: int) -> Tensor:
    """The factor with zeros up to rank r; `dim` is that of the rank: 0 of A, 1 of B."""
    missing = r - factor.shape[dim]
    if not missing:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def trained_factors(layer: Mapping[str, Any], right: Tensor, left: Tensor) -> dict[str, Tensor]:
    """A and B, and A₀ and B₀ if the layer stores them, in the dtype of the file.

    Args:
        layer: the recipe of the layer.
        right: A' [k, in], with or without rows of zeros.
        left: s·B' [out, k].

    Raises:
        ValueError: they have a smaller rank than the recipe.

    """
    r, start = layer["r"], layer.get("start")
    k = 2 * r if start else r
    if right.shape[0] < k:
        raise ValueError(f"lora_A has {right.shape[0]} rows, its recipe needs {k}")
    lora_A = right[:r].clone()
    left = (left[:, :k].double() / layer["scaling"]).to(left.dtype)
    if not start:
        return {"lora_A": lora_A, "lora_B": left}
    if start == "dst":
        like = [
            factor.to(narrow_dtype(layer, key) or factor.dtype)
            for key, factor in (("lora_A", lora_A), ("lora_B", left[:, :r]))
        ]
        start_B = dst_start(like[0], like[1], layer["beta"])[1].to(left.dtype)
        return {"lora_A": lora_A, "lora_B": left[:, :r] + start_B}
    start_B = left[:, r:].clone()
    return {
        "lora_A": lora_A,
        "lora_B": left[:, :r] + start_B,
        "start_A": lora_A - right[r:k],
        "start_B": start_B,
    }


def lost_factors(layer: LayerState, right: Tensor, left: Tensor) -> dict[str, Tensor]:
    """The factors that `trained_factors` does not give back to the last bit."""
    recipe = layer_to_dict(layer)
    back = layer_from_dict(recipe, trained_factors(recipe, right, left))
    lost = {}
    for key in FACTORS:
        factor, got = getattr(layer, key), getattr(back, key)
        # Without R, A is RA.
        if factor is not None and (got is None or not torch.equal(got, factor)):
            lost[key] = factor
    return lost


def training_tensors(state: AdapterState, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """{"layers.<name>.<factor>": tensor} of all layers' `lost_factors`, if their A' and s·B' are
    `factors`.
    """
    return {
        f"layers.{name}.{key}": factor
        for name, layer in state.layers.items()
        for key, factor in lost_factors(layer, *factors[name]).items()
    }


def fingerprint(tensors: Mapping[str, Tensor]) -> str | None:
    """Identifies the contents of a training file; None of an empty one."""
    if not tensors:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name} {dtype_name(tensor.dtype)} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
