"""`Shards`: where the local part of a sharded tensor lies in the whole.

The tensor is plain, a DTensor (FSDP2, tensor parallelism) or a partition of DeepSpeed's ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..._utils.checks import is_dtensor as is_dtensor
from .zero3 import is_partitioned, is_zero3, partition_of, settle_, zero3_shape

DTensor: TypeAlias = Any  # torch.distributed is imported only for a tensor that needs it
Group: TypeAlias = Any


Place: TypeAlias = tuple[slice, ...]  # a rectangle of the whole

# Advice in the errors of functions that accept only whole weights.
ADAPT_MODEL = "add_lora(model) adapts layers whose weights are sharded"


class Piece(NamedTuple):
    """A part of the local tensor, a view, and its place in the whole."""

    data: Tensor
    place: Place


class Block(NamedTuple):
    """A local part of a matrix [out, in]; its first entry is the matrix's [row, col]. `matrix` is
    the number of the expert; 0 if the tensor is one matrix. `data` can be written in place.
    """

    matrix: int
    data: Tensor
    row: int
    col: int


@dataclass(frozen=True)
class Shards:
    """The local part of a weight, plain or sharded.

    Attributes:
        shape: [out, in] of the whole weight; [E, out, in] for experts.
        blocks: the local parts, one or more for every local expert.
        dtype, device: those of the local parts.
        group: the processes that have the weight's parts; None if the weight is not sharded.
        primary: False if this part is a replica and sums take it from another process.
        stored: the tensor that the parts belong to.

    """

    shape: tuple[int, ...]
    blocks: list[Block]
    dtype: torch.dtype
    device: torch.device
    group: Group | None
    primary: bool
    stored: Tensor | None = None

    @staticmethod
    def of(tensor: Tensor, transposed: bool = False) -> Shards:
        """The shards of a matrix, or of a stack of matrices, stored as [in, out] if `transposed`.

        Raises:
            ValueError: the local part is not where the tensor's placements say.

        """
        sizes = full_shape(tensor)
        shape = (*sizes[:-2], sizes[-1], sizes[-2]) if transposed else sizes
        blocks = [block for piece in pieces(tensor) for block in _blocks(piece, transposed)]
        local = local_part(tensor)
        return Shards(
            shape, blocks, local.dtype, local.device, group_of(tensor), is_primary(tensor), tensor
        )

    def settle(self) -> None:
        """To be called after writing to blocks: updates other copies of the tensor."""
        if self.stored is not None:
            settle_(self.stored)

    @property
    def count(self) -> int:
        """The number of matrices."""
        return self.shape[0] if len(self.shape) == 3 else 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is sharded, even if it is whole at this moment: ZeRO-3 and FSDP1 gather a
    parameter for its layer's forward, and ZeRO-3 keeps small parameters gathered.
    """
    return is_dtensor(tensor) or is_zero3(tensor) or is_flattened(tensor)


def is_flattened(tensor: Tensor) -> bool:
    """Whether the tensor is part of a flat parameter of FSDP1. It has its own shape and values only
    while `summon_full_params` gathers it, which this package never does.
    """
    return bool(getattr(tensor, "_fsdp_flattened", False))


def is_packed(sharded: DTensor) -> bool:
    """Whether a DTensor on one mesh dimension packs several tensors that are sharded separately."""
    return sharded.device_mesh.ndim == 1 and hasattr(sharded.placements[0], "split_factor")


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    return zero3_shape(tensor) if is_zero3(tensor) else tuple(tensor.shape)


def local_part(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds: a view, flat for ZeRO-3."""
    if is_partitioned(tensor):
        return partition_of(tensor).data
    sharded: DTensor = tensor.detach()
    return sharded.to_local() if is_dtensor(tensor) else sharded


def pieces(tensor: Tensor) -> list[Piece]:
    """The local part as rectangles of the whole; [] if this process has none of it."""
    if is_partitioned(tensor):
        return [Piece(*found) for found in partition_of(tensor).rectangles()]
    if not is_dtensor(tensor):
        return [Piece(tensor.detach(), tuple(slice(0, size) for size in tensor.shape))]
    local, axes = local_part(tensor), _axes(tensor)
    found = tuple(sum(run.stop - run.start for run, _ in axis) for axis in axes)
    if found != tuple(local.shape):
        raise ValueError(
            f"the local part of a DTensor {list(tensor.shape)} is {list(local.shape)}, but its "
            f"placements {getattr(tensor, 'placements', None)} say {list(found)}"
        )
    return [
        Piece(local[tuple(run for run, _ in runs)], tuple(place for _, place in runs))
        for runs in product(*axes)
    ]


def fill_(target: Tensor, whole: Tensor) -> None:
    """Writes this process's part of `whole` into `target`, which is plain or sharded."""
    for data, place in pieces(target):
        data.copy_(whole[place])
    settle_(target)


def copied_like(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of `value` on the device of `like`. If `like` is a DTensor, so is the copy, with the
    same layout; a plain `value` must then be whole on all processes.
    """
    if not is_dtensor(like) or is_dtensor(value):
        return value.detach().to(like.device, dtype, copy=True)
    copy = torch.empty_like(like.detach(), dtype=dtype)
    fill_(copy, value)
    return copy


def text_of(tensor: Tensor) -> str:
    """How a tensor is sharded, such as "in 8 parts by rows"; "" if it is not sharded."""
    if is_zero3(tensor):
        return f"in {partition_of(tensor).parts} parts of a ZeRO-3 partition"
    if not is_dtensor(tensor):
        return ""
    sharded: DTensor = tensor
    counts: dict[int, int] = {}
    for dim, size in _sharding(sharded):
        counts[dim] = counts.get(dim, 1) * size
    names = {-1: "columns", -2: "rows", -3: "experts"}
    parts = [f"{n} parts by {names[dim - sharded.dim()]}" for dim, n in sorted(counts.items())]
    return f"in {' and '.join(parts)}" if parts else "replicated"


def group_of(tensor: Tensor) -> Group | None:
    """The processes that have parts or replicas of the tensor; None if it is plain."""
    if is_zero3(tensor):
        return partition_of(tensor).group
    if not is_dtensor(tensor):
        return None
    sharded: DTensor = tensor
    return mesh_group(sharded.device_mesh)


def mesh_group(mesh: Any) -> Group:
    """The group of all processes of a DeviceMesh."""
    import torch.distributed as dist

    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def _blocks(piece: Piece, transposed: bool) -> Iterator[Block]:
    *stack, rows, cols = piece.place
    if transposed:
        rows, cols = cols, rows
    for e in range(stack[0].start, stack[0].stop) if stack else [0]:
        data = piece.data[e - stack[0].start] if stack else piece.data
        yield Block(e, data.mT if transposed else data, rows.start, cols.start)


def is_primary(tensor: Tensor) -> bool:
    """Whether this process is the first one of those that hold this part."""
    if is_zero3(tensor) and not is_partitioned(tensor):
        return partition_of(tensor).rank == 0
    if not is_dtensor(tensor):
        return True
    sharded: DTensor = tensor
    where = sharded.device_mesh.get_coordinate() or ()
    return all(
        not placement.is_replicate() or not index
        for placement, index in zip(sharded.placements, where, strict=True)
    )


def _sharding(sharded: DTensor) -> Iterator[tuple[int, int]]:
    """(the tensor's dimension, number of parts) for every mesh dimension that shards it."""
    for index, placement in enumerate(sharded.placements):
        if hasattr(placement, "dim"):
            yield placement.dim % sharded.dim(), sharded.device_mesh.size(index)
        elif not placement.is_replicate():
            raise ValueError(f"a weight with the placement {placement} has no values of its own")


Run: TypeAlias = tuple[slice, slice]  # in the local tensor, in the whole


def _axes(sharded: DTensor) -> list[list[Run]]:
    """For every axis, its local runs of indices."""
    list(_sharding(sharded))  # refuses partial sums
    mesh, placements = sharded.device_mesh, sharded.placements
    return [_runs(size, mesh, placements, dim) for dim, size in enumerate(sharded.shape)]


def _runs(size: int, mesh: Any, placements: Sequence[Any], axis: int) -> list[Run]:
    """The runs of an axis. Its indices are sharded like the tensor, and a run ends where they jump.

    So no formula is needed for uneven and empty parts, two mesh dimensions on one axis, or strided
    shards.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    own = [_along(placement, axis) for placement in placements]
    if sum(hasattr(placement, "split_factor") for placement in own) > 1:
        raise ValueError(
            f"the weight is packed by tensor parallelism and sharded by FSDP2 along the same "
            f"dimension ({placements}), where torch does not tell which part a process has: leave "
            "this layer out of target_modules, or use one of both"
        )
    if all(placement is None for placement in own):
        return [(slice(0, size), slice(0, size))]
    placed = [Replicate() if placement is None else placement for placement in own]
    numbers = torch.arange(size, device=mesh.device_type)
    local = distribute_tensor(numbers, mesh, placed, src_data_rank=None).to_local().cpu()
    jumps = (local[1:] != local[:-1] + 1).nonzero().flatten() + 1
    bounds = [0, *jumps.tolist(), len(local)]
    return [
        (slice(begin, end), slice(int(local[begin]), int(local[begin]) + end - begin))
        for begin, end in pairwise(bounds)
        if end > begin
    ] or [(slice(0, 0), slice(0, 0))]


def axis_places(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> list[list[slice]]:
    """The local part of a tensor of this shape and layout: for each axis, the runs of its
    indices, in the order of the local tensor.
    """
    axes = (_runs(size, mesh, placements, axis) for axis, size in enumerate(shape))
    return [[place for _, place in runs] for runs in axes]


def of_dimension(placement: Any, dim: int) -> Any:
    """The same sharding, applied to the dimension `dim`."""
    from torch.distributed.tensor import Shard

    factor = getattr(placement, "split_factor", None)  # for packed rows
    return Shard(dim) if factor is None else type(placement)(dim, split_factor=factor)


def _along(placement: Any, axis: int) -> Any | None:
    """The placement of a vector sharded like the tensor's `axis`; None if that is not sharded."""
    return of_dimension(placement, 0) if getattr(placement, "dim", None) == axis else None
