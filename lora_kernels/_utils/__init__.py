"""Helpers that know nothing of LoRA."""
