"""Makes the starts of many layers, those of one shape together."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .._utils.names import nearest
from .._utils.progress import tracked
from ..init.base import Initializer
from ..init.start import Start, check_residual_fits, checked
from ..layers.base import AdaptedMatrix, refuse_unfit
from .plan import LayerPlan, _base, _naming

# 4-bit rounding changes a norm by less than 1 %; what a start takes out, by more than 2 %.
_NORM_TOLERANCE = 0.02


_BATCH_LAYERS, _BATCH_BYTES = 32, 2**31  # started together


def make_starts(
    plans: list[LayerPlan],
    initializer: Initializer,
    gradients: Mapping[str, Tensor] | None,
    progress: bool,
) -> None:
    """Makes the start of every plan, those of one shape together; weights are only read.

    Raises:
        ValueError: a gradient is missing or of no use, or a weight cannot be started from; the
            layer is named.

    """
    gradients = _matched_gradients(plans, initializer, gradients)
    batches = list(_batches(plans))
    for batch in tracked(batches, type(initializer).__name__, progress):
        first = batch[0].options
        given = [gradients[plan.name] for plan in batch] if gradients is not None else None
        matrices = [plan.matrix() for plan in batch]
        for plan, matrix in zip(batch, matrices, strict=True):
            if isinstance(plan.module, (nn.Linear, AdaptedMatrix)) or plan.kind == "conv1d":
                with _naming(plan.name):
                    refuse_unfit(matrix, _base(plan.module).weight, first.r, initializer)
        try:
            starts = batch[0].initializer.starts(matrices, first.r, first.scaling, given)
        except (ValueError, TypeError):
            for k, plan in enumerate(batch):  # which one was it?
                with _naming(plan.name):
                    plan.initializer(matrices[k], first.r, first.scaling, given and given[k])
            raise
        for plan, matrix, start in zip(batch, matrices, starts, strict=True):
            with _naming(plan.name):
                start = checked(start, matrix, first.r)
                if plan.changes_base:
                    start = _measured(start, matrix)
                    if plan.options.residual == "absorb":
                        check_residual_fits(matrix, start, first.scaling)
            plan.start = start


def _measured(start: Start, matrix: Tensor) -> Start:
    if start.weight_norm is not None:
        return start
    squares = torch.ops.lora.frobenius_stats([matrix])[0, 1]
    return replace(start, weight_norm=squares.sqrt())


def check_norms(plans: list[LayerPlan]) -> None:
    """Warns of a base that is not the one on which an adapter was made, by the weights' norms."""
    for plan in plans:
        expected = None if plan.start is None else plan.start.weight_norm
        if expected is None or float(expected) == 0:
            continue
        found = float(torch.ops.lora.frobenius_stats([plan.matrix()])[0, 1].sqrt())
        if abs(found / float(expected) - 1) > _NORM_TOLERANCE:
            warnings.warn(
                f"the norm of {plan.name} is {found:.4g}, but {float(expected):.4g} where this "
                "adapter was made: another base, or one that lacks a start already? The adapter's "
                "update is added to it as it is",
                stacklevel=4,
            )
            return


def _matched_gradients(
    plans: list[LayerPlan], initializer: Initializer, gradients: Mapping[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """The gradients by the plans' names."""
    name = type(initializer).__name__
    if not initializer.needs_gradient:
        if gradients is not None:
            raise ValueError(f"{name} has no use for gradients")
        return None
    if gradients is None:
        raise ValueError(
            f"{name} starts from the gradients of the weights: pass gradients="
            "capture_gradients(model, batches)"
        )
    found = {}
    for plan in plans:
        names = [n for n in (plan.name, *plan.aliases) if n in gradients]
        if not names:
            raise ValueError(f"gradients has none for {plan.name}{nearest(plan.name, gradients)}")
        found[plan.name] = gradients[names[0]]
    return found


def _batches(plans: list[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Plans of one shape, dtype, device, rank and s; quantised layers one at a time, so that one
    dequantised weight is there at once.
    """
    groups: dict[tuple, list[LayerPlan]] = {}
    for plan in plans:
        if not _has_matrix(plan):
            yield [plan]
            continue
        weight = _base(plan.module).weight
        key = (plan.shape, plan.kind, weight.dtype, weight.device, plan.options)
        groups.setdefault(key, []).append(plan)
    for group in groups.values():
        weight = _base(group[0].module).weight
        size = max(1, min(_BATCH_LAYERS, _BATCH_BYTES // (weight.numel() * weight.element_size())))
        for begin in range(0, len(group), size):
            yield group[begin : begin + size]


def _has_matrix(plan: LayerPlan) -> bool:
    return isinstance(plan.module, AdaptedMatrix) or plan.kind in ("linear", "conv1d")
