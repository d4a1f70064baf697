"""The sum and the sum of squares of weights of which every process has a part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .agree import from_all
from .layout import Shards


def sums_of(weights: Sequence[Shards]) -> list[Tensor]:
    """The sum and the sum of squares [matrices, 2] of each weight, float64, on its device.

    One all-gather for all weights of a group of processes, two numbers for each matrix. All
    processes add the same numbers in the order of the ranks, so the results are equal bit for bit.
    """
    local = [_local_sums(weight) for weight in weights]
    groups: dict[Any, list[int]] = {}
    for index, weight in enumerate(weights):
        if weight.group is not None:
            groups.setdefault(weight.group, []).append(index)
    for group, members in groups.items():
        rows = torch.cat([local[index] for index in members])  # [matrices of all, 2]
        added = reduce(torch.add, from_all(rows, group).unbind())  # in the order of the ranks
        for index, own in zip(
            members, added.split([weights[i].count for i in members]), strict=True
        ):
            local[index] = own.to(weights[index].device)
    return local


def largest_entry(weight: Shards) -> Tensor:
    """max |W| of each matrix [matrices], float64, over all processes; NaN if W holds one."""
    largest = torch.zeros(weight.count, dtype=torch.float64, device=weight.device)
    for matrix, data, _, _ in weight.blocks:
        if data.numel():
            largest[matrix] = torch.maximum(largest[matrix], data.abs().max().double())
    return largest if weight.group is None else from_all(largest, weight.group).amax(0)


def _local_sums(weight: Shards) -> Tensor:
    """[matrices, 2] of the local part. The sums of a replica are 0, unless it holds NaN or Inf."""
    sums = torch.zeros(weight.count, 2, dtype=torch.float64, device=weight.device)
    blocks = [block for block in weight.blocks if block.data.numel()]
    if blocks:
        found = torch.ops.lora.frobenius_stats([block.data for block in blocks])
        matrices = torch.tensor([block.matrix for block in blocks], device=weight.device)
        sums.index_add_(0, matrices, found)
    return sums if weight.primary else sums * 0
