"""What an adapted model holds: adapted layers, saved modules, and a record of its adapters."""

from .base_weights import original_weight, settled_weights
from .blocks import RepeatedBlocks
from .layers import adapted_layers, unwrapped
from .saved_modules import row_places

__all__ = [
    "RepeatedBlocks",
    "adapted_layers",
    "original_weight",
    "row_places",
    "settled_weights",
    "unwrapped",
]
