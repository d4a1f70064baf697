"""Copies of tensors in the layout of other tensors, plain or sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....init.sharded.agree import from_every, talking_device
from ....init.sharded.layout import copied_like, full_shape, group_of, is_dtensor, pieces


def sharded_from_first(value: Tensor, like: Tensor) -> Tensor:
    """A copy, in the layout of the DTensor `like`, of the plain `value` of the first process.

    All processes must call this function. With accelerate's `cpu_ram_efficient_loading`, the others
    load no weights before the model is sharded, and have no value.
    """
    import torch.distributed as dist

    group: Any = group_of(like)
    sent = value.detach().to(talking_device(value.device, group), copy=True).contiguous()
    dist.broadcast(sent, src=dist.get_global_rank(group, 0), group=group)
    return copied_like(sent, like, value.dtype)


def holds(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor has the shape and, in its dtype, the values of a whole one. If it is
    sharded, all its processes must call this function.
    """
    if full_shape(tensor) != tuple(whole.shape):
        return False
    found = all(
        torch.equal(data, whole[place].to(data.device, data.dtype))
        for data, place in pieces(tensor)
    )
    group = group_of(tensor)
    return found if group is None else all(from_every(found, group))


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors with one layout have the same values."""
    if not is_dtensor(one):
        return torch.equal(one, other)
    pairs = zip(pieces(one), pieces(other), strict=True)
    found = all(torch.equal(mine.data, theirs.data) for mine, theirs in pairs)
    return all(from_every(found, group_of(one)))
