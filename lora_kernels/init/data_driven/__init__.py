"""Starts from data: from gradients of the loss, or from the inputs of the layers."""

from .activations import Activations
from .corda import CorDA
from .eva import EVA
from .gradients import LoRAGA, LoRAOne, LoRASB
from .null import LoRANull

__all__ = ["EVA", "Activations", "CorDA", "LoRAGA", "LoRANull", "LoRAOne", "LoRASB"]
