"""Tests use the same small checkpoints as those of files/checkpoint."""

from ..files.checkpoint.conftest import odd_model

__all__ = ["odd_model"]
