"""Whole models with adapters: add them, switch between them, merge them, unload them."""
