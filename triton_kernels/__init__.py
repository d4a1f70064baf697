"""Triton kernels of the operators, installed as `lora_kernels.triton_kernels`."""
