"""Starts of sharded weights: from sums over all processes, or computed by one process for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...init.sharded.agree import agreed_randomness, has_ranks, random_states
from ...init.sharded.layout import Shards, is_sharded
from ...init.sharded.owners import OwnedStart, starts_in_turn
from ...init.sharded.sums import sums_of
from ...init.start import Start
from .first_rank import first_rank_loads
from .job import StartJob, naming
from .read import Readable, readable_shards

T = TypeVar("T")
# Makes the start of a job from its matrices and its gradient.
Make = Callable[[StartJob, Readable, "Tensor | None"], Start]


def with_ranks_alike(jobs: Sequence[StartJob], make: Callable[[], T]) -> T:
    """The result of `make()`, which computes starts on all processes, with the same random numbers
    on all of them if that matters. It matters for sharded weights, where every process has a part
    of one start, and for a start that is subtracted from a weight before the weight is sharded. It
    does not matter if the first process computes all starts.

    If it is not known whether starts draw from torch's global generators, `make` is called to find
    out, and called again if it has drawn.
    """
    device = jobs[0].base.device
    if not has_ranks() or first_rank_loads(job.base for job in jobs):
        return make()
    if not any(map(_must_draw_alike, jobs)):
        before = random_states(device)
        made = make()
        drawn = not all(map(torch.equal, before, random_states(device)))
        if not (drawn and any(map(_may_draw, jobs))):
            return made
        del made
    with agreed_randomness(device):
        return make()


def _must_draw_alike(job: StartJob) -> bool:
    """Whether the start is drawn from generators that differ; for a sharded weight, whether it may
    be. For a plain weight that is not rewritten, processes may have different starts.
    """
    initializer = job.initializer
    if job.base.sharded:
        return initializer.draws_unseeded is not False
    return initializer.changes_base and initializer.draws_unseeded is True


def _may_draw(job: StartJob) -> bool:
    """Whether the start is subtracted and it is not known whether the start is drawn."""
    return job.initializer.changes_base and job.initializer.draws_unseeded is None


def read_shards(jobs: Sequence[StartJob]) -> dict[str, Readable]:
    """What initializers may read of the layers that are sharded, by name: one collective for all
    layers of a group of processes. Layers whose starts need the entries of W are left out.
    """
    wanted = [job for job in jobs if job.base.sharded and not job.initializer.reads_entries]
    shards = [_shards_of(job) for job in wanted]
    summed = [
        own
        for job, own in zip(wanted, shards, strict=True)
        if job.initializer.reads_weight or job.initializer.changes_base
    ]
    sums = dict(zip(map(id, summed), sums_of(summed), strict=True))
    return {
        job.name: readable_shards(job, own, sums.get(id(own)))
        for job, own in zip(wanted, shards, strict=True)
    }


def starts_by_owners(
    jobs: Sequence[StartJob], gradients: Mapping[str, Tensor | None], make: Make
) -> dict[str, Start]:
    """The starts of sharded layers that need the entries of the whole weight, by name.

    Raises:
        ValueError, TypeError: what `make` raises, with the layer's name, on all processes.

    """
    groups: dict[Any, list[StartJob]] = {}
    for job in jobs:
        if job.base.sharded and job.initializer.reads_entries:
            groups.setdefault(_shards_of(job).group, []).append(job)
    starts: dict[str, Start] = {}
    for group, members in groups.items():
        owned = [_owned(job, gradients[job.name], make) for job in members]
        made = starts_in_turn(owned, group)
        starts |= {job.name: start for job, start in zip(members, made, strict=True)}
    return starts


def _owned(job: StartJob, gradient: Tensor | None, make: Make) -> OwnedStart:
    """The job of one process, which gets the whole weight and the whole gradient."""
    parts = [job.base.stored_weight]
    if gradient is not None and is_sharded(gradient):
        parts.append(gradient)

    def made(whole: Sequence[Tensor]) -> Start:
        weight = whole[0].mT if job.base.transposed else whole[0]
        matrices = list(weight.unbind()) if weight.dim() == 3 else [weight]
        given = whole[1] if len(whole) == 2 else gradient
        return make(job, Readable(matrices, [None] * len(matrices)), given)

    return OwnedStart(parts, made)


def _shards_of(job: StartJob) -> Shards:
    with naming(job.name):
        return job.base.shards()
