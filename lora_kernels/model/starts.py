"""Computes the initial factors of many layers, in batches of one shape, for `add_lora` and
`lora_kernels.peft.initialize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._utils.checks import check_rank
from .._utils.names import nearest
from .._utils.progress import tracked
from ..init.base import Initializer
from ..init.start import Start, check_residual_fits, checked, checked_stack
from ..layers.base import BaseLayer
from ..layers.kinds import EMBEDDING
from ..layers.linear import check_startable

_BATCH_LAYERS, _BATCH_BYTES = 32, 2**31  # at most so many weights and bytes of them in one call
_BATCH_EXPERTS = 1024


@dataclass(frozen=True)
class StartJob:
    """A layer whose start is to be computed, with rank `r` and s = `scaling`.

    `absorb` says whether s·B₀A₀ will be subtracted from the weight, whose dtype must then be able
    to hold the difference. `aliases` are further names of the layer, for its gradient.
    """

    name: str
    base: BaseLayer
    initializer: Initializer
    r: int
    scaling: float
    absorb: bool = False
    aliases: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.base.kind == EMBEDDING:
            object.__setattr__(self, "initializer", self.initializer.for_embedding())


@torch.no_grad()
def make_starts(
    jobs: Sequence[StartJob], gradients: Mapping[str, Tensor] | None, progress: bool
) -> dict[str, Start]:
    """The start of every job by the job's name; no weight is changed.

    `gradients` are {layer name: ∂loss/∂W [out, in], of experts [E, out, in]}, for starts that need
    them. Starts that change the base have the weight's norm, `weight_norm`. The start of experts is
    the `Start.stacked` one of a start for each.

    Raises:
        ValueError, TypeError: a gradient is missing or of no use, a start cannot be computed or has
            the wrong shape or dtype, or the weight's dtype cannot hold W − s·B₀A₀; the layer is
            named.

    """
    matched = _matched_gradients(jobs, gradients)
    starts: dict[str, Start] = {}
    title = type(jobs[0].initializer).__name__
    for batch in tracked(list(_batches(jobs)), title, progress):
        if batch[0].base.num_experts is None:
            starts |= _batch_starts(batch, [matched[job.name] for job in batch])
        else:
            starts[batch[0].name] = _stacked_start(batch[0], matched[batch[0].name])
    return {job.name: starts[job.name] for job in jobs}


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Adds the layer's name in front of the text of a ValueError or TypeError."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{layer}: {error}") from error


def _matched_gradients(
    jobs: Sequence[StartJob], gradients: Mapping[str, Tensor] | None
) -> dict[str, Tensor | None]:
    """The gradient [out, in] of each job's layer; None if the start does not need one."""
    initializer = jobs[0].initializer
    title = type(initializer).__name__
    if not initializer.needs_gradient:
        if gradients is not None:
            raise ValueError(f"{title} has no use for gradients")
        return {job.name: None for job in jobs}
    if gradients is None:
        raise ValueError(
            f"{title} starts from the gradients of the weights: pass gradients="
            "capture_gradients(model, batches)"
        )
    found: dict[str, Tensor | None] = {}
    for job in jobs:
        name = next((n for n in (job.name, *job.aliases) if n in gradients), None)
        if name is None:
            raise ValueError(f"gradients has none for {job.name}{nearest(job.name, gradients)}")
        found[job.name] = gradients[name]
    return found


def _batch_starts(
    batch: Sequence[StartJob], gradients: Sequence[Tensor | None]
) -> dict[str, Start]:
    weights = [_checked_weight(job) for job in batch]
    first = batch[0]
    given = gradients if first.initializer.needs_gradient else None
    try:
        starts = first.initializer.starts(weights, first.r, first.scaling, given)
    except (ValueError, TypeError):
        for job, weight, gradient in zip(batch, weights, gradients, strict=True):
            with naming(job.name):  # finds the layer that failed
                job.initializer(weight, job.r, job.scaling, gradient)
        raise
    found = {}
    for job, weight, start in zip(batch, weights, starts, strict=True):
        with naming(job.name):
            found[job.name] = _finished(job, weight, start)
    return found


def _stacked_start(job: StartJob, gradient: Tensor | None) -> Start:
    """The start of all experts of a parameter."""
    matrices, stored = job.base.matrices(), job.base.stored_weight
    given: list[Tensor | None] = [None] * len(matrices)
    if gradient is not None:
        if gradient.dim() != 3 or len(gradient) != len(matrices):
            wanted = [len(matrices), *job.base.shape]
            raise ValueError(
                f"the gradient of {job.name} is {list(gradient.shape)}, its experts need {wanted}"
            )
        given = list(gradient.unbind())
    with naming(job.name):
        for matrix in matrices:
            check_startable(matrix, stored, job.r, job.initializer)
    starts: list[Start] = []
    size = matrices[0].numel() * matrices[0].element_size()
    step = max(1, min(_BATCH_EXPERTS, _BATCH_BYTES // max(1, size)))
    for begin in range(0, len(matrices), step):
        part = slice(begin, begin + step)
        wanted_gradients = given[part] if job.initializer.needs_gradient else None
        try:
            starts += job.initializer.starts(matrices[part], job.r, job.scaling, wanted_gradients)
        except (ValueError, TypeError):
            for e, matrix in enumerate(matrices[part], start=begin):
                with naming(f"{job.name}[{e}]"):  # finds the expert that failed
                    job.initializer(matrix, job.r, job.scaling, given[e])
            raise
    with naming(job.name):
        start = checked_stack(starts, matrices, job.r)
    if not job.initializer.changes_base:
        return start
    if start.weight_norm is None:
        squares = torch.ops.lora.frobenius_stats(matrices)[:, 1]
        start = replace(start, weight_norm=squares.sqrt())
    for e, matrix in enumerate(matrices if job.absorb else ()):
        with naming(f"{job.name}[{e}]"):
            check_residual_fits(matrix, start.expert(e), job.scaling)
    return start


def _checked_weight(job: StartJob) -> Tensor:
    """W [out, in], checked to be one from which the start can be computed."""
    with naming(job.name):
        if job.base.rewritable:
            check_startable(job.base.weight(), job.base.stored_weight, job.r, job.initializer)
        else:
            check_rank(job.r, *job.base.shape)
        return job.base.weight()


def _finished(job: StartJob, weight: Tensor, start: Start) -> Start:
    start = checked(start, weight, job.r)
    if not job.initializer.changes_base:
        return start
    if start.weight_norm is None:
        squares = torch.ops.lora.frobenius_stats([weight])[0, 1]
        start = replace(start, weight_norm=squares.sqrt())
    if job.absorb:
        check_residual_fits(weight, start, job.scaling)
    return start


def _batches(jobs: Sequence[StartJob]) -> Iterator[list[StartJob]]:
    """Batches of jobs with equal shape, dtype and device of the weight, equal r and equal s.

    A quantized layer is a batch of its own, so that only one dequantized weight is in memory; so
    are experts, which are many matrices.
    """
    groups: dict[tuple[object, ...], list[StartJob]] = {}
    for job in jobs:
        base = job.base
        if not base.rewritable or base.num_experts is not None:
            yield [job]
            continue
        key = (base.shape, base.kind, base.dtype, base.device, job.r, job.scaling, job.absorb)
        groups.setdefault(key, []).append(job)
    for group in groups.values():
        weight = group[0].base.stored_weight
        size = max(1, min(_BATCH_LAYERS, _BATCH_BYTES // (weight.numel() * weight.element_size())))
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]
