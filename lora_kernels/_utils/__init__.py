"""Helpers that do not depend on LoRA."""
