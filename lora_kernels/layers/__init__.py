"""One linear layer with adapters: `LoRALinear`, `LoRAConv1D` and `LoRAWrapper`."""
