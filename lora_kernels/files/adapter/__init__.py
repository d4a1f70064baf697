"""Folders of adapters."""
