"""Figures of losses: against the rate, and against the step at the best rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.study.methods import FULL, RANK, REFERENCE
from benchmarks.study.plan import SEEDS, rate
from benchmarks.study.report.cells import GROUPS, Measured, Study
from benchmarks.study.report.figures.style import (
    STYLES,
    finish,
    handles,
    panels,
    save,
)
from benchmarks.study.report.statistics import mean_interval


def loss_against_rate(study: Study, path: Path) -> bool:
    """All cells with at least one run, also unfinished cells."""

    def paint(axis: Any, own: list[Measured]) -> None:
        for measured in own:
            _grid(axis, measured)
        _limits(axis, own)
        axis.set_xscale("log")

    title = (
        "Final loss against the rate. Line: the first seed; large marks: means of three seeds "
        "with 95 % intervals; × at the top: diverged; dotted: the untouched model"
    )
    return _save(study.cells, paint, "peak learning rate", path, title)


def loss_against_step(study: Study, path: Path) -> bool:
    """The tuned cells: the mean held-out curve at the best rate, from the first check on."""

    def paint(axis: Any, own: list[Measured]) -> None:
        for measured in own:
            style = STYLES[measured.cell.method]
            marks = style.marks(4) | {"linestyle": style.line, "linewidth": 1.2}
            axis.plot(*zip(*measured.mean_curve()[1:], strict=True), **marks)

    tuned = [own for own in study.tuned if len(own.mean_curve()) > 1]
    title = "Held-out loss at each method's best rate, mean of three seeds, from the first check on"
    return _save(tuned, paint, "step", path, title)


def _save(
    cells: Sequence[Measured],
    paint: Callable[[Any, list[Measured]], None],
    xlabel: str,
    path: Path,
    title: str,
) -> bool:
    """A row of panels for each group of methods and for each other rank; a column for each task."""
    groups = _groups(cells)
    if not groups:
        return False

    def panel(axis: Any, group: str, task: str) -> bool:
        own = [m for m in groups[group] if m.cell.task == task]
        if not own:
            return False
        paint(axis, _with_references(cells, own))
        finish(axis, f"{task}: {group}", xlabel, "held-out loss")
        return True

    legends = {
        name: handles({m.cell.method for m in _with_references(cells, own)})
        for name, own in groups.items()
    }
    tasks = list(dict.fromkeys(measured.cell.task for measured in cells))
    save(panels(legends, tasks, panel), path, title)
    return True


def _groups(cells: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The groups of methods at r = 16, then the other ranks, without empty ones."""
    found = {
        name: [m for m in cells if m.cell.r == RANK and m.cell.method in members]
        for name, members in GROUPS.items()
    }
    for r in sorted({m.cell.r for m in cells} - {RANK}):
        found[f"r = {r}"] = [m for m in cells if m.cell.r == r]
    return {name: own for name, own in found.items() if own}


def _with_references(cells: Sequence[Measured], own: list[Measured]) -> list[Measured]:
    """LoRA of the same rank and full fine-tuning first, so that the other methods are drawn over
    them.
    """
    wanted = {(m.cell.task, REFERENCE, m.cell.r) for m in own}
    wanted |= {(m.cell.task, FULL, RANK) for m in own}
    references = [m for m in cells if (m.cell.task, m.cell.method, m.cell.r) in wanted]
    return list(dict.fromkeys([*references, *own]))


def _grid(axis: Any, own: Measured) -> None:
    """The first seed's line, all seeds' points, and the means with their intervals."""
    style = STYLES[own.cell.method]
    first = {k: loss for k, loss in own.first.items() if math.isfinite(loss)}
    axis.plot(
        [rate(k) for k in first], list(first.values()), style.line, color=style.color, linewidth=1.0
    )
    for seed in SEEDS:
        losses = own.losses(seed)
        axis.plot([rate(k) for k in losses], list(losses.values()), **style.marks(2.5))
        lost = [rate(k) for k, loss in losses.items() if not math.isfinite(loss)]
        axis.plot(
            lost, [0.97] * len(lost), "x", color=style.color, transform=axis.get_xaxis_transform()
        )
    for k in own.means:
        mean, half = mean_interval([own.losses(seed)[k] for seed in SEEDS])
        axis.errorbar(rate(k), mean, half, **style.marks(6), capsize=2, elinewidth=1.0)


def _limits(axis: Any, cells: list[Measured]) -> None:
    """From below the smallest loss to above the untouched model's loss, which a line marks."""
    losses = [loss for own in cells for loss in own.first.values() if math.isfinite(loss)]
    # Init[AB+] starts near the untouched model, the other methods exactly at it.
    untouched = median(float(row["start_loss"]) for own in cells for row in own.runs.values())
    lowest = min([*losses, untouched])
    axis.axhline(untouched, color="black", linestyle=":", linewidth=0.8)
    margin = 0.08 * (untouched - lowest)
    axis.set_ylim(lowest - margin, untouched + 2 * margin)
