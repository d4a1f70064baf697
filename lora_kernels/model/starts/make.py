"""Computes the initial factors of many layers, in batches of one shape, for `add_lora` and
`lora_kernels.peft.initialize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._utils.names import nearest
from ..._utils.progress import tracked
from ...init.fused import joined
from ...init.start import Start, check_residual_fits, checked, checked_stack
from ...layers.kinds import NAMED_KINDS
from .job import StartJob, naming
from .parts import part_names
from .read import Readable, readable, telling_of_values
from .sharded import read_shards, starts_by_owners, with_ranks_alike

_BATCH_LAYERS, _BATCH_BYTES = 32, 2**31  # the most weights, and bytes of weights, in one call
_BATCH_EXPERTS = 1024
_SOURCES = {"gradients": "gradients of the weights", "activations": "inputs of the layers"}


@torch.no_grad()
def make_starts(
    jobs: Sequence[StartJob],
    gradients: Mapping[str, Tensor] | None,
    progress: bool,
    activations: Mapping[str, Any] | None = None,
) -> dict[str, Start]:
    """The start of every job by the job's name; no weight is changed.

    `gradients` are {layer name: ∂loss/∂W [out, in], or [E, out, in] for experts}, and `activations`
    the statistics of each layer's inputs, for starts that need them. Starts that change the base
    have the weight's norm, `weight_norm`. The start of experts is the `Start.stacked` of one start
    for each expert.

    Raises:
        ValueError, TypeError: a gradient or a layer's activations are missing or of no use, a start
            cannot be computed or has the wrong shape or dtype, or the weight's dtype cannot hold
            W − s·B₀A₀; the layer is named.

    """
    data = _matched_data(jobs, gradients, activations)
    own_gradients = {name: own.gradient for name, own in data.items()}

    def start(job: StartJob, weight: Readable, gradient: Tensor | None) -> Start:
        return _start(job, weight, data[job.name]._replace(gradient=gradient))

    starts = starts_by_owners(jobs, own_gradients, start)
    others = [job for job in jobs if job.name not in starts]
    if others:
        read = read_shards(others)
        starts |= with_ranks_alike(others, lambda: _starts(others, read, data, progress))
    return {job.name: starts[job.name] for job in jobs}


def _starts(
    jobs: Sequence[StartJob],
    read: Mapping[str, Readable],
    data: Mapping[str, _Data],
    progress: bool,
) -> dict[str, Start]:
    """The starts that every process computes itself; `read` are the layers that are sharded."""
    starts: dict[str, Start] = {}
    title = type(jobs[0].initializer).__name__
    for batch in tracked(list(_batches(jobs)), title, progress):
        readables = [read.get(job.name) or readable(job) for job in batch]
        if _is_alone(batch[0]):
            job = batch[0]
            starts[job.name] = _start(job, readables[0], data[job.name])
        else:
            starts |= _batch_starts(batch, readables, [data[job.name] for job in batch])
    return starts


class _Data(NamedTuple):
    """What a start is computed from besides W, or None."""

    gradient: Tensor | None = None
    activations: Any = None


def _matched_data(
    jobs: Sequence[StartJob],
    gradients: Mapping[str, Tensor] | None,
    activations: Mapping[str, Any] | None,
) -> dict[str, _Data]:
    """The data of each job's layer."""
    initializer = jobs[0].initializer
    own = matched(jobs, gradients, "gradients", initializer.needs_gradient)
    measured = matched(jobs, activations, "activations", initializer.needs_activations)
    return {job.name: _Data(own[job.name], measured[job.name]) for job in jobs}


def matched(
    jobs: Sequence[StartJob], given: Mapping[str, Any] | None, what: str, needed: bool
) -> dict[str, Any]:
    """The entry of `given` for each job's layer; None if the start does not need one."""
    title = type(jobs[0].initializer).__name__
    if not needed:
        if given is not None:
            raise ValueError(f"{title} does not use {what}")
        return {job.name: None for job in jobs}
    if what == "activations":
        for job in jobs:
            _refuse_without_inputs(job, title)
    if given is None:
        raise ValueError(
            f"{title} starts from the {_SOURCES[what]}: pass {what}=capture_{what}(model, batches)"
        )
    found = {}
    for job in jobs:
        name = next((n for n in (job.name, *job.aliases) if n in given), None)
        if name is None:
            raise ValueError(
                f"{what} has none for {job.name}: capture those of all layers that are adapted"
                f"{nearest(job.name, given)}"
            )
        found[job.name] = given[name]
    return found


def _refuse_without_inputs(job: StartJob, title: str) -> None:
    """Raises ValueError if `capture_activations` cannot measure the inputs of the layer."""
    if job.base.num_experts is not None:
        raise ValueError(
            f"{job.name} holds experts, and nothing measures the inputs of each: {title} is "
            "for linear layers; leave out target_parameters"
        )
    if job.base.kind in NAMED_KINDS:
        raise ValueError(
            f"{job.name} is {type(job.base.module).__name__}, which has no inputs x of x Wᵀ: "
            f"{title} is for linear layers; leave it out with exclude_modules"
        )


def _batch_starts(
    batch: Sequence[StartJob], weights: Sequence[Readable], data: Sequence[_Data]
) -> dict[str, Start]:
    """The starts of layers that are one matrix each, of one shape."""
    first = batch[0]
    matrices, sums = [own.matrices[0] for own in weights], [own.sums[0] for own in weights]
    starts = []
    with telling_of_values(first, weights[0]):
        computed = _computed(first, matrices, data, sums, [job.name for job in batch])
        for job, matrix, start in zip(batch, matrices, computed, strict=True):
            with naming(job.name):
                starts.append(checked(start, matrix, job.r))
    found = {}
    for job, own, start in zip(batch, weights, starts, strict=True):
        with naming(job.name):
            found[job.name] = _finished(job, own, start)
    return found


def _start(job: StartJob, weight: Readable, data: _Data) -> Start:
    """The start of one layer; for experts, of all of them."""
    if job.parts:
        return _fused_start(job, weight, data)
    if job.base.num_experts is None:
        return _batch_starts([job], [weight], [data])[job.name]
    matrices, gradient = weight.matrices, data.gradient
    given = [data] * len(matrices)
    if gradient is not None:
        if gradient.dim() != 3 or len(gradient) != len(matrices):
            wanted = [len(matrices), *job.base.shape]
            raise ValueError(
                f"the gradient of {job.name} is {list(gradient.shape)}, its experts need {wanted}"
            )
        given = [data._replace(gradient=own) for own in gradient.unbind()]
    starts: list[Start] = []
    size = matrices[0].numel() * matrices[0].element_size()
    step = max(1, min(_BATCH_EXPERTS, _BATCH_BYTES // max(1, size)))
    names = [job.named(e) for e in range(len(matrices))]
    with telling_of_values(job, weight):
        for begin in range(0, len(matrices), step):
            part = slice(begin, begin + step)
            starts += _computed(job, matrices[part], given[part], weight.sums[part], names[part])
        with naming(job.name):
            start = checked_stack(starts, matrices, job.r)
    return _finished(job, weight, start)


def _fused_start(job: StartJob, weight: Readable, data: _Data) -> Start:
    """The start of a fused layer: the starts of its parts, each computed from its rows of W."""
    (matrix,), gradient = weight.matrices, data.gradient
    if gradient is not None and gradient.shape != matrix.shape:
        wanted = list(matrix.shape)
        raise ValueError(f"the gradient of {job.name} is {list(gradient.shape)}, expected {wanted}")
    like = replace(job, r=job.matrix_rank)
    names = list(part_names(job.name, job.parts, len(matrix)))
    by_rows: dict[int, list[int]] = {}
    for k, (begin, end) in enumerate(job.parts):
        by_rows.setdefault(end - begin, []).append(k)
    starts: dict[int, Start] = {}
    for alike in by_rows.values():
        rows = [slice(*job.parts[k]) for k in alike]
        own = [matrix[part] for part in rows]
        given = [
            data if gradient is None else data._replace(gradient=gradient[part]) for part in rows
        ]
        computed = _computed(like, own, given, [None] * len(rows), [names[k] for k in alike])
        for k, part, start in zip(alike, own, computed, strict=True):
            with naming(names[k]):
                starts[k] = checked(start, part, like.r)
    with naming(job.name):
        start = joined([starts[k] for k in range(len(names))], job.parts, len(matrix))
    return _finished(job, weight, start)


def _computed(
    like: StartJob,
    matrices: Sequence[Tensor],
    data: Sequence[_Data],
    sums: Sequence[Tensor | None],
    names: Sequence[str],
) -> list[Start]:
    """The starts of several matrices by the initializer, rank and scaling of `like`."""
    initializer, r, scaling = like.initializer, like.r, like.scaling
    gradients, measured = [own.gradient for own in data], [own.activations for own in data]
    given = gradients if initializer.needs_gradient else None
    try:
        return initializer.starts(matrices, r, scaling, given, sums, measured)
    except (ValueError, TypeError):
        for k, name in enumerate(names):
            part = slice(k, k + 1)
            with naming(name):  # the error names the matrix that failed
                initializer.starts(
                    matrices[part], r, scaling, gradients[part], sums[part], measured[part]
                )
        raise


def _finished(job: StartJob, weight: Readable, start: Start) -> Start:
    """The checked start, with the weight's norm, if the residual fits into the weight's dtype."""
    if not job.initializer.changes_base:
        return start
    stacked = job.base.num_experts is not None
    if start.weight_norm is None:
        norms = weight.squares().sqrt()
        start = replace(start, weight_norm=norms if stacked else norms[0])
    for e, matrix in enumerate(weight.matrices if job.absorb else ()):
        own = start.expert(e) if stacked else start
        with naming(job.named(e)) if stacked else nullcontext():
            check_residual_fits(matrix, own, job.scaling, weight.largest(e))
    return start


def _is_alone(job: StartJob) -> bool:
    """Whether the layer's start consists of the starts of several matrices."""
    return job.base.num_experts is not None or bool(job.parts)


def _batches(jobs: Sequence[StartJob]) -> Iterator[list[StartJob]]:
    """Batches of jobs with equal shape, dtype and device of the weight, equal r and equal s.

    Each quantized layer is its own batch, so that only one dequantized weight is in memory. Experts
    and fused layers, which are many matrices, are their own batches too.
    """
    groups: dict[tuple[object, ...], list[StartJob]] = {}
    for job in jobs:
        base = job.base
        if not base.rewritable or _is_alone(job):
            yield [job]
            continue
        shape = (base.shape, base.kind, base.dtype, base.device, base.sharded)
        key = (*shape, job.r, job.scaling, job.absorb)
        groups.setdefault(key, []).append(job)
    for group in groups.values():
        local = group[0].base.local
        bytes_each = max(1, local.numel() * local.element_size())
        size = max(1, min(_BATCH_LAYERS, _BATCH_BYTES // bytes_each))
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]
