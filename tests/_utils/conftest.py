"""Models in folders, as for the tests of checkpoints."""

from ..files.checkpoint.conftest import odd_model

__all__ = ["odd_model"]
