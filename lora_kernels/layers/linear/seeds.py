"""Seeds with which all processes of a mesh draw the same dropout masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ...init.sharded.agree import from_all
from ...init.sharded.layout import mesh_group
from ...ops.philox import dropout_seed

_MEMORY = 65_536  # how many forwards of a mesh have their seeds stored, in case they are repeated
_STEP = 0x9E3779B97F4A7C15  # an odd number of 64 bits (Steele et al., OOPSLA'14)


class _OwnSeeds:
    """The seeds of a mesh whose processes have different random generators: functions of a number
    that they agreed on and of the count of forwards.

    A forward that activation checkpointing repeats must get the same seed again. The process
    recognizes it by what it draws from its own generator, whose state checkpointing restores.
    """

    def __init__(self, agreed: int) -> None:
        self.agreed, self.count = agreed, 0
        self.counts: dict[int, int] = {}

    def seed(self) -> int:
        drawn = int(dropout_seed(torch.device("cpu")))
        if drawn not in self.counts:
            self.count += 1
            self.counts[drawn] = self.count
            if len(self.counts) > _MEMORY:
                del self.counts[next(iter(self.counts))]
        return (self.agreed + _STEP * self.counts[drawn]) % 2**63


_SEEDS: dict[Any, _OwnSeeds | None] = {}  # by mesh and kind of device; None: generators are equal


def agree_on_seeds(mesh: Any, device: torch.device) -> None:
    """Checks with one all-gather whether all processes of the mesh would draw the same seeds.

    `mesh_seed` calls this once for a mesh, but cannot while it is being compiled.
    """
    if (mesh, device.type) not in _SEEDS:
        drawn = _next_seeds(mesh, device)
        equal = len(set(drawn)) == 1
        _SEEDS[mesh, device.type] = None if equal else _OwnSeeds(drawn[0])


def mesh_seed(mesh: Any, device: torch.device, batch_part: int = 0) -> Tensor:
    """A seed for `dropout`, the same on all processes of the mesh that have the same part of the
    batch.

    If their generators are equal, as after `torch.manual_seed` with one seed, the seed is that of
    `dropout_seed`, which a single process would draw. This is checked once. If generators differ
    only later, or in a compiled forward, the masks differ between processes.
    """
    if is_dynamo_compiling():
        own = None
    else:
        agree_on_seeds(mesh, device)
        own = _SEEDS[mesh, device.type]
    seed = dropout_seed(device) if own is None else torch.tensor(own.seed(), device=device)
    return seed + _STEP * batch_part % 2**63 if batch_part else seed


def _next_seeds(mesh: Any, device: torch.device) -> list[int]:
    """What `dropout_seed` would return next on each process of the mesh."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        drawn = dropout_seed(device).reshape(1)
    return [int(seed) for seed in from_all(drawn, mesh_group(mesh))]
