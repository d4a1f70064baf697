"""Starts that make up for a base's quantization error."""

from .loftq import LoftQ

__all__ = ["LoftQ"]
