"""Batches in which each row has its own adapter: `adapters_per_row`.

A call of the model runs once for each adapter, with the rows of that adapter: `context` intercepts
the calls, `arguments` splits their arguments and joins their results, `caches` does so with
transformers' key-value caches, and `rows` with tensors.
"""

from .context import adapters_per_row

__all__ = ["adapters_per_row"]
