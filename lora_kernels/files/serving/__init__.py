"""Checks adapters by the rules of other programs, and writes adapters in their formats."""
