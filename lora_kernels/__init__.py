"""LoRA with its kernels: operators, initialisers and the layer. See the README for a tour."""

from . import init as init
from . import ops as ops
from ._version import __version__ as __version__
from .linear import LoRALinear as LoRALinear
