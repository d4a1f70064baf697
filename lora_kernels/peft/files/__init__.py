"""Files of PEFT's adapters: the portable form of a model's adapter, and how it is read back."""
