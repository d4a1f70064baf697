"""Parameters that DeepSpeed's ZeRO-3 has partitioned.

Every process holds one stretch of the flattened tensor in `ds_tensor`; all stretches have the same
length. The Parameter itself is empty while the whole is not needed. DeepSpeed is not imported: this
module uses the attributes that DeepSpeed sets on the Parameter
(`deepspeed/runtime/zero/partition_parameters.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from torch import Tensor

from .agree import from_all

Place: TypeAlias = tuple[slice, ...]
Partitioned: TypeAlias = Any  # a Parameter with DeepSpeed's attributes

_NOT_GATHERED = "NOT_AVAILABLE"  # the names of deepspeed's ZeroParamStatus
_IN_FLIGHT = "INFLIGHT"


@dataclass(frozen=True)
class Partition:
    """The stretch of a flattened tensor that this process holds.

    Attributes:
        data: the stretch [n], a view that can be written; empty past the tensor's end.
        begin: the index of its first entry in the flattened tensor.
        shape: the shape of the whole tensor.
        group: the processes that hold the stretches, in the order of their ranks there.
        parts: the number of these processes.
        rank: the rank of this process among them.

    """

    data: Tensor
    begin: int
    shape: tuple[int, ...]
    group: Any
    parts: int
    rank: int

    def rectangles(self) -> Iterator[tuple[Tensor, Place]]:
        """The stretch as rectangles of the whole, (view, place): for a matrix, the rest of a row,
        whole rows, and the beginning of a row; for experts, the same within each expert that is
        cut.
        """
        begin = 0
        for place in _boxes(self.shape, self.begin, self.begin + len(self.data)):
            sizes = [part.stop - part.start for part in place]
            end = begin + prod(sizes)
            yield self.data[begin:end].view(sizes), place
            begin = end


def is_zero3(tensor: Tensor) -> bool:
    """Whether ZeRO-3 manages the tensor, whether or not it is partitioned at this moment."""
    return hasattr(tensor, "ds_id") and getattr(tensor, "ds_tensor", None) is not None


def is_partitioned(tensor: Tensor) -> bool:
    """Whether the tensor is a ZeRO-3 parameter of which this process has only its stretch now.

    It has the whole within `deepspeed.zero.GatheredParameters`, and while DeepSpeed keeps small
    parameters gathered.

    Raises:
        ValueError: DeepSpeed is gathering it at this moment.

    """
    if not is_zero3(tensor):
        return False
    status = _status(tensor)
    if status == _IN_FLIGHT:
        raise ValueError(
            "DeepSpeed is gathering this ZeRO-3 parameter at this moment: finish the training step "
            "with its backward first"
        )
    return status == _NOT_GATHERED


def zero3_shape(tensor: Partitioned) -> tuple[int, ...]:
    """The shape of the whole ZeRO-3 parameter, wherever its parts are."""
    return tuple(tensor.ds_shape)


def partition_of(tensor: Partitioned) -> Partition:
    """The stretch of this process, without the padding after the tensor, which is uninitialized.

    Raises:
        ValueError: the stretch is on NVMe or quantized, or the tensor is cut in another way.

    """
    import torch.distributed as dist

    stored, group = tensor.ds_tensor, tensor.ds_process_group
    shape = zero3_shape(tensor)
    _refuse_unreadable(tensor)
    size, parts, length = stored.ds_numel, dist.get_world_size(group), prod(shape)
    if size != -(-length // parts) or stored.numel() < size:
        raise ValueError(
            f"{parts} processes hold {stored.numel()} entries each of a ZeRO-3 parameter "
            f"{list(shape)}: this is not the partition of DeepSpeed's zero.Init (MiCS is another); "
            "adapt the model before deepspeed.initialize"
        )
    rank = dist.get_rank(group)
    begin = min(size * rank, length)
    data = stored.detach().view(-1)[: min(size, length - begin)]
    return Partition(data, begin, shape, group, parts, rank)


def gathered(tensor: Partitioned) -> Tensor:
    """A copy of the whole tensor. If it is partitioned, all its processes have to call this."""
    if not is_partitioned(tensor):
        return tensor.detach().clone()
    own = partition_of(tensor)
    padded = own.data.new_zeros(tensor.ds_tensor.ds_numel)
    padded[: len(own.data)] = own.data
    return from_all(padded, own.group).view(-1)[: prod(own.shape)].view(own.shape)


def settle_(tensor: Tensor) -> None:
    """Updates DeepSpeed's other copies after this process wrote its part of the tensor: its stretch
    or, if the tensor was gathered, the whole (alike on all processes).
    """
    if not is_zero3(tensor):
        return
    managed: Partitioned = tensor
    if not is_partitioned(tensor):  # DeepSpeed drops the whole when it releases the parameter
        own = partition_of(managed)
        whole = managed.detach().reshape(-1)
        own.data.copy_(whole[own.begin : own.begin + len(own.data)])
    if getattr(managed, "ds_secondary_tensor", None) is not None:
        managed.ds_secondary_tensor = None  # ZeRO++'s; DeepSpeed rebuilds it, as after a step


def _boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Place]:
    """The entries `begin` to `end` of a flattened tensor of this shape as boxes, in their order."""
    if begin >= end:
        return
    if len(shape) <= 1:
        yield (slice(begin, end),) if shape else ()
        return
    inner = prod(shape[1:])
    first, last = -(-begin // inner), end // inner  # the whole slabs
    if first > last:  # within one slab
        yield from _within(shape, last, begin, end)
        return
    yield from _within(shape, first - 1, begin, first * inner)
    if first < last:
        yield (slice(first, last), *(slice(0, size) for size in shape[1:]))
    yield from _within(shape, last, last * inner, end)


def _within(shape: tuple[int, ...], slab: int, begin: int, end: int) -> Iterator[Place]:
    offset = slab * prod(shape[1:])
    for place in _boxes(shape[1:], begin - offset, end - offset):
        yield (slice(slab, slab + 1), *place)


def _status(tensor: Partitioned) -> str:
    return str(tensor.ds_status.name)


def _refuse_unreadable(tensor: Partitioned) -> None:
    """Raises ValueError if this process cannot read its stretch, or if it holds quantized codes."""
    stored = tensor.ds_tensor
    copies = (stored, getattr(tensor, "ds_secondary_tensor", None))
    if getattr(stored, "final_location", None) == "nvme":
        raise ValueError(
            "the partition of this ZeRO-3 parameter is on NVMe: adapt the model before "
            'deepspeed.initialize, or with offload_param "cpu"'
        )
    is_quantized = getattr(tensor, "weight_quantized", False)
    if is_quantized or any(hasattr(copy, "ds_quant_scale") for copy in copies):
        raise ValueError(
            "the partition of this ZeRO-3 parameter is quantized: leave "
            "zero_quantized_nontrainable_weights and quantized_initialization out of DeepSpeed's "
            "configuration"
        )
