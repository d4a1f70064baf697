"""PEFT's `lora_bias`: a bias of B, which is multiplied by s and added to the layer's output."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ...._utils.checks import FLOATS
from ...._utils.peft_names import BIAS_OF_B, split_by_layer

# The layer's name; then the adapter's name, which `save_pretrained` leaves out.
_NAME = re.compile(r"(.+)\.lora_B(?:\.[^.]+)?\.bias")


def split_biases(
    values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The biases [out] by the names of their layers in the base model, and all other tensors.

    Args:
        values: the content of `adapter_config.json`.
        tensors: the tensors by PEFT's names.

    """
    if not values.get(BIAS_OF_B):
        return {}, dict(tensors)
    return split_by_layer(_NAME, tensors)


def check_biases(
    biases: Mapping[str, Tensor], sizes: Mapping[str, int], layers: Collection[str]
) -> None:
    """Raises ValueError unless exactly the layers in `layers` have biases, each of its size."""
    for name in (*layers, *biases):
        if name not in biases:
            raise ValueError(f"{BIAS_OF_B} is true, but the bias of lora_B of {name!r} is missing")
        if name not in sizes:
            raise ValueError(f"{name!r} has a bias of lora_B, but no lora_A and lora_B")
        bias = biases[name]
        if bias.dtype not in FLOATS or tuple(bias.shape) != (sizes[name],):
            raise ValueError(
                f"the bias of lora_B of {name!r} is {list(bias.shape)} of {bias.dtype}, expected "
                f"[{sizes[name]}] of a floating-point type"
            )
