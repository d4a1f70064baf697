"""PEFT's adapters of experts (`target_parameters`): as stacks, and with the fused forward."""
