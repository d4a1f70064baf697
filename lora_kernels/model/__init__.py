"""Whole models with adapters."""
