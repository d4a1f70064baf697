"""Batches whose rows have adapters of their own: `adapters_per_row`.

A call of the model is run once for each adapter, with the rows of that adapter: `context` takes the
calls, `arguments` cuts what they are given and joins what they return, `caches` does so with
transformers' key-value caches, `rows` with tensors.
"""

from .context import adapters_per_row

__all__ = ["adapters_per_row"]
