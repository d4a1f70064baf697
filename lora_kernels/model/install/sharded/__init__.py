"""Models whose weights are sharded over processes."""
