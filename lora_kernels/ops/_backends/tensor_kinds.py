"""`lora::_tensor_kinds`: what the host has to know about many tensors before it launches a kernel.

A model has only a handful of kinds of weights, so what depends on the kind is computed once per
kind. The GPU waits meanwhile: for 224 weights, C++ (csrc/cpu/kinds.cpp) needs a tenth of Python's
time.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from .library import define_kernel


def tensor_kinds_ref(
    tensors: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """(the number of each tensor's kind, each tensor's address, the first tensor of each kind).

    Tensors of one kind agree in dtype, shape, strides and device, and in whether their address is a
    multiple of 16 bytes. Both returned tensors are int64 on the CPU.
    """
    kinds: dict[tuple[object, ...], int] = {}
    numbers, addresses = [], []
    firsts: list[int] = []
    for k, tensor in enumerate(tensors):
        address = tensor.data_ptr()
        kind = (tensor.dtype, tensor.shape, tensor.stride(), tensor.device, address % 16 == 0)
        number = kinds.setdefault(kind, len(kinds))
        if number == len(firsts):
            firsts.append(k)
        numbers.append(number)
        addresses.append(address)
    return (
        torch.tensor(numbers, dtype=torch.int64, device="cpu"),
        torch.tensor(addresses, dtype=torch.int64, device="cpu"),
        firsts,
    )


def _fake(tensors: list[torch.Tensor]) -> NoReturn:
    raise NotImplementedError("lora::_tensor_kinds needs real tensors: only kernels call it")


define_kernel("_tensor_kinds(Tensor[] tensors) -> (Tensor, Tensor, int[])", tensor_kinds_ref, _fake)
