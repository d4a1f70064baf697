"""PEFT's `lora_magnitude_vector`: the norms m of a DoRA weight's rows (`use_dora`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...._utils.checks import FLOATS
from ...._utils.peft_names import DORA, PREFIX, split_by_layer

# The layer's name; then the adapter's name and ".weight", which `save_pretrained` leaves out.
_NAME = re.compile(r"(.+)\.lora_magnitude_vector(?:\.[^.]+){0,2}")


def magnitude_key(layer: str) -> str:
    """The name of a layer's magnitudes in a file."""
    return f"{PREFIX}{layer}.lora_magnitude_vector"


def in_shape(magnitude: Tensor, kernel: Sequence[int]) -> Tensor:
    """Magnitudes [out] in PEFT's shape: [1, out, 1 ...] for a convolution with this `kernel`, which
    is empty for other layers.
    """
    return magnitude.view(1, -1, *(1 for _ in kernel)) if kernel else magnitude


def is_magnitude(key: str) -> bool:
    """Whether this is the name of magnitudes in a file."""
    return key.startswith(PREFIX) and _NAME.fullmatch(key) is not None


def split_magnitudes(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The magnitudes by the names of their layers in the base model, and all other tensors.

    Args:
        values: the content of `adapter_config.json`.
        tensors: the tensors by PEFT's names.

    """
    if not values.get(DORA):
        return {}, dict(tensors)
    return split_by_layer(_NAME, tensors)


def checked_magnitudes(
    magnitudes: Mapping[str, Tensor], sizes: Mapping[str, int], layers: Collection[str]
) -> dict[str, Tensor]:
    """The magnitudes as vectors [out]; PEFT's convolutions have them as [1, out, 1, 1].

    Args:
        magnitudes: the magnitudes by the names of the layers.
        sizes: the numbers of rows of all layers that may have magnitudes.
        layers: the names of the layers that must have magnitudes.

    Raises:
        ValueError: a layer lacks its magnitudes or has some of another size, or there are
            magnitudes of an unknown layer.

    """
    found = {}
    for name in (*layers, *magnitudes):
        if name not in magnitudes:
            raise ValueError(
                f"{DORA} is true, but the lora_magnitude_vector of {name!r} is missing"
            )
        if name not in sizes:
            raise ValueError(f"{name!r} has a lora_magnitude_vector, but no lora_A and lora_B")
        magnitude, rows = magnitudes[name], sizes[name]
        vector = tuple(magnitude.shape) == (rows,)
        of_convolution = magnitude.dim() > 2 and magnitude.shape[1] == magnitude.numel() == rows
        if magnitude.dtype not in FLOATS or not (vector or of_convolution):
            raise ValueError(
                f"the lora_magnitude_vector of {name!r} is {list(magnitude.shape)} of "
                f"{magnitude.dtype}, expected [{rows}] of a floating-point type"
            )
        found[name] = magnitude.reshape(rows)
    return found
