"""Initializers: one file per family of starts, one registry of names."""

from .base import Initializer, get_initializer, initializer_names, register_initializer
from .data_driven import LoRAGA, LoRAOne, LoRASB
from .loftq import LoftQ
from .loram import LoRAM
from .random import Gaussian, InitAB, InitABPlus, InitB, LoRA
from .spectral import LoRAXS, MiLoRA, OLoRA, PiSSA
from .start import Start, StartRequest

__all__ = [
    "Gaussian",
    "InitAB",
    "InitABPlus",
    "InitB",
    "Initializer",
    "LoRA",
    "LoRAGA",
    "LoRAM",
    "LoRAOne",
    "LoRASB",
    "LoRAXS",
    "LoftQ",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "Start",
    "StartRequest",
    "get_initializer",
    "initializer_names",
    "register_initializer",
]
