"""Starts that need a whole weight, computed on the processes that hold its parts: each process
computes the starts of some weights, which are sent to it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..start import Start
from .agree import from_all, from_every, shared, talking_device
from .layout import Place, full_shape, group_of, is_primary, local_part, pieces


@dataclass(frozen=True)
class OwnedStart:
    """A start to compute from whole tensors. `parts` are sharded; `make` gets the whole tensors,
    oriented as they are stored, on the device of the first part.
    """

    parts: Sequence[Tensor]
    make: Callable[[Sequence[Tensor]], Start]


def starts_in_turn(jobs: Sequence[OwnedStart], group: Any) -> list[Start]:
    """The starts of all jobs, on all processes of the group, over which the jobs' tensors are
    sharded. Each process has at most one job's whole tensors at a time.

    Raises:
        Exception: what `make` raised on one of the processes; raised on all.

    """
    import torch.distributed as dist

    count = dist.get_world_size(group)
    places = _places(jobs, group)
    starts: list[Start] = []
    for first in range(0, len(jobs), count):
        turn = jobs[first : first + count]
        own = _collected(turn, places[first : first + count], group)
        made = _Made(turn[dist.get_rank(group)], own) if own is not None else None
        del own
        for owner, job in enumerate(turn):
            start = shared(owner, made.result if made else _nothing, group)
            starts.append(moved(start, local_part(job.parts[0]).device))
    return starts


class _Made:
    """A computed start, or the error raised, on the process that computed it."""

    def __init__(self, job: OwnedStart, parts: Sequence[Tensor]) -> None:
        self.start: Start | None = None
        self.error: Exception | None = None
        try:
            self.start = moved(job.make(parts), torch.device("cpu"))
        except Exception as error:
            self.error = error

    def result(self) -> Start:
        """The start; raises the error if there is one."""
        if self.start is None:
            raise self.error or RuntimeError("no start was made")
        return self.start


def _nothing() -> Start:
    raise RuntimeError("this process makes no start in this turn")


def moved(start: Start, device: torch.device) -> Start:
    """The start with its tensors on the device."""
    values = {field.name: getattr(start, field.name) for field in fields(start)}
    tensors: dict[str, Any]
    tensors = {name: v.to(device) for name, v in values.items() if isinstance(v, Tensor)}
    if start.taken is not None:
        tensors["taken"] = (start.taken[0].to(device), start.taken[1].to(device))
    earlier = None if start.earlier is None else moved(start.earlier, device)
    return replace(start, **tensors, earlier=earlier)


def gathered_pieces(part: Tensor) -> Tensor:
    """The whole of a sharded tensor on all its processes, whatever its placements are."""
    group = group_of(part)
    places = from_every(_own_places(part), group)
    sizes = [sum(map(_size, theirs)) for theirs in places]
    own = _flat(part)
    padded = own.new_zeros(max(sizes))
    padded[: len(own)] = own
    rows = from_all(padded, group)
    return _assembled(part, [row[:size] for row, size in zip(rows, sizes, strict=True)], places)


# By job and process: where that process's pieces of every tensor lie; none for a replica.
Places: TypeAlias = list[list[list[list[Place]]]]


def _places(jobs: Sequence[OwnedStart], group: Any) -> Places:
    own = [[_own_places(part) for part in job.parts] for job in jobs]
    found = from_every(own, group)
    return [[theirs[index] for theirs in found] for index in range(len(jobs))]


def _own_places(part: Tensor) -> list[Place]:
    return [place for _, place in pieces(part)] if is_primary(part) else []


def _collected(turn: Sequence[OwnedStart], places: Places, group: Any) -> list[Tensor] | None:
    """The whole tensors of this process's job; None if it has none in this turn."""
    import torch.distributed as dist

    me = dist.get_rank(group)
    transfers, kept = _Transfers(group), []
    for owner, job in enumerate(turn):
        for part, own in zip(job.parts, places[owner][me], strict=True):
            if own and owner != me:
                kept.append(_flat(part))
                transfers.send(kept[-1], owner)
    if me >= len(turn):
        transfers.wait()
        return None
    received = [
        [
            _flat(part) if rank == me else transfers.receive(part, theirs[index], rank)
            for rank, theirs in enumerate(places[me])
        ]
        for index, part in enumerate(turn[me].parts)
    ]
    transfers.wait()
    return [
        _assembled(part, flat, [theirs[index] for theirs in places[me]])
        for index, (part, flat) in enumerate(zip(turn[me].parts, received, strict=True))
    ]


class _Transfers:
    """Tensors that the processes of a group send to each other, all at the same time."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._waiting: list[Any] = []

    def send(self, flat: Tensor, rank: int) -> None:
        self._add("isend", flat, rank)

    def receive(self, part: Tensor, places: Sequence[Place], rank: int) -> Tensor:
        """A flat tensor that holds what `rank` sends, once `wait` has returned."""
        size = sum(_size(place) for place in places)
        local = local_part(part)
        device = talking_device(local.device, self._group)
        flat = torch.empty(size, dtype=local.dtype, device=device)
        self._add("irecv", flat, rank)
        return flat

    def wait(self) -> None:
        import torch.distributed as dist

        for work in dist.batch_isend_irecv(self._waiting) if self._waiting else []:
            work.wait()

    def _add(self, name: str, flat: Tensor, rank: int) -> None:
        import torch.distributed as dist

        if flat.numel():
            peer = dist.get_global_rank(self._group, rank)
            flat = flat.to(talking_device(flat.device, self._group))
            self._waiting.append(dist.P2POp(getattr(dist, name), flat, peer, self._group))


def _flat(part: Tensor) -> Tensor:
    """The local pieces of a tensor, one after the other."""
    return torch.cat([local_part(part).new_empty(0), *(p.data.reshape(-1) for p in pieces(part))])


def _assembled(part: Tensor, flat: Sequence[Tensor], places: Sequence[Sequence[Place]]) -> Tensor:
    """The whole tensor, from what every process has of it."""
    local = local_part(part)
    whole = torch.empty(full_shape(part), dtype=local.dtype, device=local.device)
    for values, theirs in zip(flat, places, strict=True):
        begin = 0
        for place in theirs:
            target = whole[place]
            target.copy_(values[begin : begin + target.numel()].view(target.shape))
            begin += target.numel()
    return whole


def _size(place: Place) -> int:
    return prod(part.stop - part.start for part in place)
