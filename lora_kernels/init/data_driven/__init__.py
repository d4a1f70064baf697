"""Starts from data: from gradients of the loss, or from the inputs of the layers."""

from .gradients import LoRAGA, LoRAOne, LoRASB

__all__ = ["LoRAGA", "LoRAOne", "LoRASB"]
