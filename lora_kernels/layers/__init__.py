"""One layer with adapters: `LoRALinear`, `LoRAConv1D`, `LoRAEmbedding` and `LoRAWrapper`."""
