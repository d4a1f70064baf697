"""Initializers: one file per family of starts, one registry of names."""

import sys

from .base import Initializer, get_initializer, initializer_names, register_initializer
from .data_driven import EVA, Activations, CorDA, LoRAGA, LoRANull, LoRAOne, LoRASB
from .loram import LoRAM
from .quantized import QERA, LoftQ, quantizers
from .random import Gaussian, InitAB, InitABPlus, InitB, LoRA, Orthogonal
from .spectral import KaSA, LoRAXS, MiCA, MiLoRA, OLoRA, PiSSA
from .start import Start, StartRequest

__all__ = [
    "EVA",
    "QERA",
    "Activations",
    "CorDA",
    "Gaussian",
    "InitAB",
    "InitABPlus",
    "InitB",
    "Initializer",
    "KaSA",
    "LoRA",
    "LoRAGA",
    "LoRAM",
    "LoRANull",
    "LoRAOne",
    "LoRASB",
    "LoRAXS",
    "LoftQ",
    "MiCA",
    "MiLoRA",
    "OLoRA",
    "Orthogonal",
    "PiSSA",
    "Start",
    "StartRequest",
    "get_initializer",
    "initializer_names",
    "register_initializer",
]

# A public module inside a sub-package; this makes `import lora_kernels.init.quantizers` work.
sys.modules[f"{__name__}.quantizers"] = quantizers
