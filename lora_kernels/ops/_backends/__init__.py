"""How operators are declared, and which kernels run where.

`library` declares, `extension` loads the compiled CPU kernels, `cpu_capability` chooses their
instruction set, `triton` registers the GPU kernels, and `tensor_kinds` describes lists of tensors
for them.
"""
