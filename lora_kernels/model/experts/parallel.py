"""Factors of experts whose parameters are DTensors in the forward: transformers' expert parallelism
(a process has some of the experts) and tensor parallelism (a process has a part of each).

If W [E, out, in] is sharded along E, so are A and B, and every process trains the factors of its
own experts. If W is sharded along `out`, B is sharded and A is replicated; along `in`, A is sharded
and B is replicated. Every process computes a part of the gradient of a replicated factor, and
autograd sums the parts: no collective in the forward, one all-reduce of A or B in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...init.sharded.layout import axis_places, copied_like, is_dtensor
from ...layers.adapter import Adapter

DTensor = Any  # torch.distributed is imported only for a tensor that needs it
Mesh = Any
Placements = tuple[Any, ...]
# The dimension of W [E, out, in] for each dimension of A₀ and B₀; None for the rank.
_AXES: dict[str, tuple[int | None, ...]] = {"start_A": (0, None, 2), "start_B": (0, 1, None)}


@dataclass(frozen=True)
class LocalPart:
    """The local part of W [E, out, in] in the forward: runs of indices for each dimension.

    Attributes:
        runs: of E, of out and of in.

    """

    runs: tuple[list[slice], ...]

    @staticmethod
    def laid_out(
        shape: Sequence[int], transposed: bool, mesh: Mesh, placements: Placements
    ) -> LocalPart:
        """The local part of a parameter of this shape, stored as [E, in, out] if `transposed`, that
        has these placements in the forward. Nothing is sent.
        """
        experts, rows, columns = axis_places(shape, mesh, placements)
        return LocalPart((experts, columns, rows) if transposed else (experts, rows, columns))

    @property
    def seed(self) -> int:
        """A change of the dropout's seed: the processes' inputs of A belong to different experts or
        are different columns, and must not have the same mask.
        """
        experts, _, columns = ((runs or [slice(0, 0)])[0].start for runs in self.runs)
        return (experts << 32) + columns

    def of(self, whole: Tensor, name: str) -> Tensor:
        """A copy of this process's part of a whole `start_A` or `start_B`."""
        part = whole
        for dim, axis in enumerate(_AXES[name]):
            if axis is not None:
                cuts = [
                    part.narrow(dim, run.start, run.stop - run.start) for run in self.runs[axis]
                ]
                part = torch.cat(cuts, dim)
        return part.contiguous()

    def of_start(self, start: tuple[Tensor | None, ...]) -> tuple[Tensor | None, Tensor | None]:
        """The local parts of A₀ and B₀, which are whole or DTensors; None for None."""
        names = ("start_A", "start_B")
        A, B = (t if t is None else _own(self, t, n) for t, n in zip(start, names, strict=True))
        return A, B


def cut_start(adapter: Adapter) -> None:
    """Makes A₀ and B₀, if they are stored, DTensors with the placements of A and B."""
    for name, own in {"start_A": adapter.lora_A, "start_B": adapter.lora_B}.items():
        whole: Tensor | None = getattr(adapter, name)
        if whole is not None and not whole.is_meta and not is_dtensor(whole):
            setattr(adapter, name, copied_like(whole, own, whole.dtype))


def local_factors(adapter: Adapter, part: LocalPart | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A [E, r, in], B [E, out, r] and R [E, r, r] or None. If the forward has a part of W, they are
    plain tensors for that part, and their gradients reach all processes that need them.
    """
    A, B, R = adapter.lora_A, adapter.lora_B, adapter.middle()
    if part is None:
        return A, B, R
    pairs = zip(_placements(A), _placements(B), strict=True)
    # If one of the two is sharded, each process has a part of the other one's gradient.
    split = [a.is_replicate() != b.is_replicate() for a, b in pairs]
    return _local(A, split), _local(B, split), None if R is None else _local(R, split)


def _own(part: LocalPart, tensor: DTensor, name: str) -> Tensor:
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else part.of(tensor, name)
    return own


def _placements(factor: DTensor) -> Placements:
    return tuple(factor.placements)


def _local(factor: DTensor, split: Sequence[bool]) -> Tensor:
    from torch.distributed.tensor import Partial

    placements = _placements(factor)
    grads = [
        Partial() if is_split and placement.is_replicate() else placement
        for placement, is_split in zip(placements, split, strict=True)
    ]
    if any(grad is not placement for grad, placement in zip(grads, placements, strict=True)):
        # Nothing is sent here; the backward forms the sum, which the optimizer needs.
        factor = factor.redistribute(placements=placements)
    local: Tensor = factor.to_local(grad_placements=grads)
    return local
