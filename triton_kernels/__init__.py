"""Triton kernels of the operators, one file each; installed as `lora_kernels.triton_kernels`."""
