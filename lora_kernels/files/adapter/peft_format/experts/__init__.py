"""Adapters of experts in PEFT's files: a pair of matrices of each expert, or of all of them."""
