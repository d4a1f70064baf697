"""Benchmarks on a CUDA GPU: `python -m benchmarks.gpu [PART ...]`, from the repository root."""
