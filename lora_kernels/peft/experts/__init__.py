"""PEFT's adapters of experts (`target_parameters`), as stacks and in our operator's forward."""
