"""magnitude.png: final losses against the magnitude of the update, and against the rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study.report.cells import Study
from benchmarks.study.report.figures.style import STYLES, finish, handles, panels, save, spread_out
from benchmarks.study.report.hypotheses.magnitude import (
    LIMIT,
    Curves,
    Trained,
    curves,
    trained_runs,
)

_COLUMNS = ("the magnitude", "the rate")


def loss_against_magnitude(study: Study, path: Path) -> bool:
    """The finished cells at r = 16, first seed, and the curves that decide hypothesis 3."""
    runs = {task: found for task in study.tasks if (found := trained_runs(study, task))}
    if not runs:
        return False
    entries = handles({run.method for found in runs.values() for run in found})

    def paint(axis: Any, task: str, column: str) -> bool:
        own = runs[task]
        of_rate, found = column == _COLUMNS[1], curves(own)
        weight = float(np.median([run.nu_weight for run in own]))
        for run in own:
            x = run.rate if of_rate else math.sqrt(run.nu_update / weight)
            axis.plot(x, run.loss, **STYLES[run.method].marks(5))
        label = ""
        if found is not None:
            label = f", R² = {(found.of_rate if of_rate else found.of_update).r_squared:.2f}"
            _curve(axis, found, weight, of_rate)
        _limits(axis, own)
        axis.set_xscale("log")
        xlabel = "peak learning rate" if of_rate else "√(ν[ΔW] / ν[W])"
        finish(axis, f"{task}: against {column}{label}", xlabel, "held-out loss")
        return True

    title = (
        f"Final losses of the first seed at r = 16, all methods and rates. Gray: up to {LIMIT:g} "
        "times the smallest, where the cubic is fitted; losses far above are cut off"
    )
    save(panels(spread_out(entries, list(runs)), _COLUMNS, paint), path, title)
    return True


def _curve(axis: Any, found: Curves, weight: float, of_rate: bool) -> None:
    curve = found.of_rate.curve if of_rate else found.of_update.curve
    x = np.linspace(curve.domain[0], curve.domain[1], 100)
    shown = 10**x if of_rate else np.sqrt(10**x / weight)
    axis.plot(shown, curve(x), color="black", linewidth=1.5, zorder=3)
    axis.axhspan(min(run.loss for run in found.fitted), found.limit, color="#eeeeee", zorder=0)


def _limits(axis: Any, runs: Sequence[Trained]) -> None:
    """Limit the axis to 1.5 times the range of the fit, unless all losses are lower."""
    losses = [run.loss for run in runs]
    lowest = min(losses)
    top = min(max(losses), lowest * (1 + 1.5 * (LIMIT - 1)))
    margin = 0.06 * (top - lowest) or 0.01
    axis.set_ylim(lowest - margin, top + margin)
