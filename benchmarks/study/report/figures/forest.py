"""best_losses.png: how far each tuned method is from LoRA, with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.study.methods import METHODS, RANK
from benchmarks.study.plan import Cell
from benchmarks.study.report.cells import GROUPS, Study
from benchmarks.study.report.comparisons import Comparison, compare_with_lora
from benchmarks.study.report.figures.style import STYLES, TEXT, finish, pyplot, save
from benchmarks.study.report.hypotheses.losses import NEARLY_EQUAL


def best_losses(study: Study, path: Path) -> bool:
    """The comparisons at r = 16; a method without a clear difference has an open mark."""
    found = {cell: c for cell, c in compare_with_lora(study).items() if cell.r == RANK}
    tasks = [task for task in study.tasks if any(cell.task == task for cell in found)]
    if not tasks:
        return False
    methods = [name for name in METHODS if any(cell.method == name for cell in found)]
    figure, axes = pyplot().subplots(
        1,
        len(tasks),
        figsize=(1.8 + 3.4 * len(tasks), max(2.6, 1.4 + 0.27 * len(methods))),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, task in zip(axes.flat, tasks, strict=True):
        for position, method in enumerate(methods):
            if (cell := Cell(task, method)) in found:
                _mark(axis, position, found[cell], STYLES[method].color)
        _decorate(axis, methods)
        finish(axis, task, "difference of the final loss, %", "")
    axes[0, 0].set_yticks(range(len(methods)), [METHODS[m].title for m in methods], fontsize=TEXT)
    axes[0, 0].set_ylim(len(methods) - 0.4, -0.6)
    title = (
        "Final loss against LoRA (B = 0), each at its best rate: mean of the differences of three "
        "seeds with 95 % intervals. Filled: clearly different by Holm's method. Gray: within ± 2 %"
    )
    save(figure, path, title)
    return True


def _mark(axis: Any, position: int, comparison: Comparison, color: str) -> None:
    found = comparison.difference
    face = "white" if comparison.verdict == "no clear difference" else color
    axis.plot([found.low, found.high], [position] * 2, color=color, linewidth=1.6)
    axis.plot(found.mean, position, "o", color=color, markerfacecolor=face, markersize=6)


def _decorate(axis: Any, methods: list[str]) -> None:
    """Draw zero, the band of hypothesis 1, and lines between the groups."""
    axis.axvspan(-NEARLY_EQUAL, NEARLY_EQUAL, color="#eeeeee", zorder=0)
    axis.axvline(0, color="#444444", linewidth=1.0)
    group = {method: name for name, members in GROUPS.items() for method in members}
    for position in range(1, len(methods)):
        if group[methods[position]] != group[methods[position - 1]]:
            axis.axhline(position - 0.5, color="black", linewidth=0.6)
