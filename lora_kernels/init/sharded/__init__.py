"""Sharded weights: where each process's part lies in the whole, and what all processes share."""
