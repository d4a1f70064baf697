"""Bytes on disk, without LoRA: a pipeline of blocks, and what survives a kill."""
