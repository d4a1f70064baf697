"""Benchmarks and the demo; run them from the repository root, ``python -m benchmarks.<name>``."""
