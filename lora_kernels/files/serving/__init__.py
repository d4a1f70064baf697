"""Adapters as other programs load them: checked by their rules, and written in their formats."""
