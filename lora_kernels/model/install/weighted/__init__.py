"""An adapter that is a weighted combination of others: `add_weighted_adapter`."""

from .adapter import add_weighted_adapter

__all__ = ["add_weighted_adapter"]
