"""Layers with adapters that replace a layer with a floating-point weight and use this weight."""

from .conv1d import LoRAConv1D
from .embedding import LoRAEmbedding
from .float_layer import ABSORBED, AdaptedFloatLayer, check_startable, merged_bias, rounded_sum
from .linear import LoRALinear

__all__ = [
    "ABSORBED",
    "AdaptedFloatLayer",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "check_startable",
    "merged_bias",
    "rounded_sum",
]
