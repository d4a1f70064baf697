"""Tests of the commands use the same small checkpoints."""

from ..files.checkpoint.conftest import gpt2, llama, odd_model

__all__ = ["gpt2", "llama", "odd_model"]
