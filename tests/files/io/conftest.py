"""The format's tests run on the same small checkpoints."""

from ..checkpoint.conftest import odd_model

__all__ = ["odd_model"]
