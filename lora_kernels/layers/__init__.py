"""One layer with adapters: `LoRALinear`, its kin, and what they are made over."""
