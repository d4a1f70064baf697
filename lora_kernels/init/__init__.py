"""Initialisers: one file per family, one registry of names."""

from .base import Initializer, Start
from .lora import LoRA
from .loram import LoRAM
from .registry import get_initializer, initializer_names, register_initializer
from .spectral import MiLoRA, OLoRA, PiSSA

__all__ = [
    "Initializer",
    "LoRA",
    "LoRAM",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "Start",
    "get_initializer",
    "initializer_names",
    "register_initializer",
]
