"""Partitions as DeepSpeed's `zero.Init` makes them, without DeepSpeed; and DeepSpeed itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn


class ZeroParamStatus(Enum):
    """As in deepspeed/runtime/zero/partition_parameters.py."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def partition(parameter: nn.Parameter, group: Any = None) -> nn.Parameter:
    """Partitions a Parameter that all ranks have: each rank keeps its stretch. As in DeepSpeed, the
    part of a stretch beyond the tensor's end is not initialized; here it is NaN.
    """
    made: Any = parameter
    group = dist.group.WORLD if group is None else group
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    flat = parameter.detach().reshape(-1)
    size = -(-len(flat) // world)
    stretch = torch.full((size,), float("nan"), dtype=flat.dtype)
    own = flat[size * rank : size * (rank + 1)]
    stretch[: len(own)] = own
    made.ds_id, made.ds_shape, made.ds_numel = id(parameter), parameter.shape, len(flat)
    made.ds_tensor, made.ds_secondary_tensor, made.ds_persist = stretch, None, False
    made.ds_tensor.ds_numel, made.ds_tensor.final_location = size, None
    made.ds_process_group = group
    return release(parameter)


def release(parameter: nn.Parameter) -> nn.Parameter:
    """Frees the whole parameter without writing it back, as DeepSpeed does after a forward."""
    made: Any = parameter
    made.ds_status = ZeroParamStatus.NOT_AVAILABLE
    parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    return parameter


def gather(parameter: nn.Parameter) -> nn.Parameter:
    """Gives every rank the whole parameter, as DeepSpeed does before a layer's forward."""
    made: Any = parameter
    parts = [torch.empty_like(made.ds_tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, made.ds_tensor)
    parameter.data = torch.cat(parts)[: made.ds_numel].view(made.ds_shape)
    made.ds_status = ZeroParamStatus.AVAILABLE
    return parameter


def partition_all(model: nn.Module) -> nn.Module:
    """Partitions all parameters that are not partitioned yet, as `zero.Init` does for a model and
    `deepspeed.initialize` for new parameters; returns the model.
    """
    for parameter in model.parameters():
        if not hasattr(parameter, "ds_id"):
            partition(parameter)
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside the block, all partitioned parameters are whole, as in their layers' forwards."""
    here = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    for parameter in here:
        gather(parameter)
    try:
        yield
    finally:
        for parameter in here:
            release(parameter)


def with_deepspeed() -> Any:
    """The package deepspeed, on the CPU; skips the test where it is missing.

    Its `init_distributed` would compile an operator for shared memory, which no test needs.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed
