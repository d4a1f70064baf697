"""Gathers a sharded tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .layout import is_dtensor, is_packed
from .owners import gathered_pieces
from .zero3 import gathered, is_partitioned


def whole(tensor: Tensor, keep: bool = True) -> Tensor:
    """A copy of the whole tensor on the CPU, contiguous. If it is sharded, all its processes have
    to call this; with `keep=False` a process gets a tensor of its shape on the meta device.
    """
    found: Any = tensor.detach()
    if is_partitioned(tensor):
        found = gathered(tensor)
    elif is_dtensor(tensor) and is_packed(tensor):
        found = gathered_pieces(tensor)  # torch 2.11 cannot
    elif is_dtensor(tensor):
        found = found.full_tensor()
    if not keep:
        return torch.empty(found.shape, dtype=found.dtype, device="meta")
    copied: Tensor = found.to("cpu", copy=True).contiguous()
    return copied
