"""PEFT's adapters in files: the portable form of a model's adapter, and how it is restored."""
