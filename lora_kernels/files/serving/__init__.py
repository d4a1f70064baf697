"""Adapters as other programs load them: checked against their rules, and written in their formats."""
