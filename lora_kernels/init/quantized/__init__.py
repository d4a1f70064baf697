"""Starts that compensate for a base's quantization error."""

from .loftq import LoftQ
from .qera import QERA

__all__ = ["QERA", "LoftQ"]
