"""Optimizer rules: they rewrite the gradients of A and B before a `torch.optim` optimizer's step.

LoRA-Pro, Riemannian preconditioning and LoRA-FA, public in `lora_kernels.optim`. `pairs` and
`peft_pairs` find the factors; `blocks` stacks those of one shape; `spectrum` has the batched r × r
algebra; each rule has a file; `attach` registers a rule on an optimizer.
"""
