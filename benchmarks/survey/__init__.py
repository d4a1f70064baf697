"""What add_lora, adapter files and the command line do with transformers' architectures."""
