"""Writes and reads PEFT's adapter format (PEFT 0.21), and predicts how PEFT itself loads it."""
