"""Benchmarks that need no GPU: `python -m benchmarks.cpu.<name>`."""
