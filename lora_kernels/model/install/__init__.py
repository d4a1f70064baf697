"""What a model carries of its adapters: their layers, their saved modules, and a record of them."""

from .blocks import RepeatedBlocks
from .layers import adapted_layers, unwrapped
from .saved_modules import row_places

__all__ = ["RepeatedBlocks", "adapted_layers", "row_places", "unwrapped"]
