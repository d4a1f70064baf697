"""PEFT's adapter format, as of PEFT 0.21: written, read, and how PEFT itself loads it."""
