"""Layers with adapters that replace a layer with a floating-point weight and use this weight."""

from .attention import LoRAAttention, LoRAOutProjection
from .conv import LoRAConv
from .conv1d import LoRAConv1D
from .embedding import LoRAEmbedding
from .float_layer import ABSORBED, AdaptedFloatLayer, check_startable, merged_bias, rounded_sum
from .linear import LoRALinear

__all__ = [
    "ABSORBED",
    "AdaptedFloatLayer",
    "LoRAAttention",
    "LoRAConv",
    "LoRAConv1D",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAOutProjection",
    "check_startable",
    "merged_bias",
    "rounded_sum",
]
