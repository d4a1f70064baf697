"""`Readable`: what an initializer may read of a layer's weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._utils.checks import check_rank
from ...init.sharded.layout import Shards
from ...init.sharded.sums import largest_entry
from ...layers.linear import check_startable
from .job import StartJob, naming


@dataclass(frozen=True)
class Readable:
    """The matrices W [out, in] of a layer: one, or one for each expert.

    The matrices of a sharded layer have shape, dtype and device, but no values. Then `sums` has the
    sum and the sum of squares of each matrix's entries, and `shards` has the layer's parts.
    """

    matrices: Sequence[Tensor]
    sums: Sequence[Tensor | None]
    shards: Shards | None = None

    def squares(self) -> Tensor:
        """The sum of squares of each matrix, float64."""
        known = [own[1] for own in self.sums if own is not None]
        if known:
            return torch.stack(known)
        return torch.ops.lora.frobenius_stats(list(self.matrices))[:, 1]

    def largest(self, matrix: int) -> Callable[[], Tensor] | None:
        """A function that returns max |W| of one of the matrices, if they have no values; all
        processes must call it.
        """
        shards = self.shards
        return None if shards is None else lambda: largest_entry(shards)[matrix]


def readable(job: StartJob) -> Readable:
    """The matrices of a layer that is not sharded.

    Raises:
        ValueError: no start of this rank and kind can be computed from them; the layer is named.

    """
    with naming(job.name):
        if not job.base.rewritable:
            check_rank(job.matrix_rank, *job.base.shape)
        matrices = job.base.matrices()
        check_readable(job, matrices)
    return Readable(matrices, [None] * len(matrices))


def readable_shards(job: StartJob, shards: Shards, sums: Tensor | None) -> Readable:
    """The matrices of a sharded layer, with their `sums` [matrices, 2] if a start needs them.

    Raises:
        ValueError: as `readable`.

    """
    # NaN: if a start reads the values anyway, it is not finite, which is an error.
    number = torch.full((), torch.nan, dtype=shards.dtype, device=shards.device)
    matrices = [number.expand(*shards.shape[-2:])] * shards.count
    with naming(job.name):
        check_readable(job, matrices)
    return Readable(matrices, [None] * shards.count if sums is None else sums.unbind(), shards)


@contextmanager
def telling_of_values(job: StartJob, weight: Readable) -> Iterator[None]:
    """If the initializer fails because it reads the values of a weight that has none here, although
    its `reads_weight` denies that it reads them, the error says so.
    """
    try:
        yield
    except (ValueError, TypeError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        if weight.shards is None or job.initializer.reads_weight:
            raise
        kind, text = type(job.initializer).__name__, str(error).rstrip(".")
        raise ValueError(
            f"{text}. By its class attribute reads_weight, {kind} does not read the values of a "
            "weight, and gets none of a sharded one: set it to True if it does"
        ) from error


def check_readable(job: StartJob, matrices: Sequence[Tensor]) -> None:
    """Raises ValueError if a start cannot be computed from the matrices of a `rewritable` layer."""
    for matrix in matrices if job.base.rewritable else ():
        check_startable(matrix, job.base.stored_weight, job.matrix_rank, job.initializer)
