"""Adapters of experts in PEFT's files: a pair of matrices for each expert, or one for all."""
