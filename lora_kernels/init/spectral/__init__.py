"""Starts from a factorization of the weight."""

from .minor import KaSA, MiCA, MiLoRA
from .principal import LoRAXS, OLoRA, PiSSA

__all__ = ["KaSA", "LoRAXS", "MiCA", "MiLoRA", "OLoRA", "PiSSA"]
