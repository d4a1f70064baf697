"""predicted_rates.png: the best rates that were found against the rates that theory predicts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.methods import RANK
from benchmarks.study.report.cells import Study
from benchmarks.study.report.figures.style import STYLES, finish, handles, panels, save, spread_out
from benchmarks.study.report.hypotheses.rates import STEP
from benchmarks.study.report.methods import ReportRow
from benchmarks.study.report.rates import rate_rows

_KINDS = {
    "on the grid": ("predicted_rate", "rate"),
    "between its rates": ("interpolated_predicted_rate", "interpolated_rate"),
}


def found_and_predicted(study: Study, path: Path) -> bool:
    """One row of panels for rates on the grid and one for interpolated rates; a panel for each
    task.
    """
    rows = rate_rows(study)
    found = {
        (kind, task): points
        for kind, columns in _KINDS.items()
        for task in study.tasks
        if (points := [r for r in rows if r["task"] == task and all(c in r for c in columns)])
    }
    if not found:
        return False

    def paint(axis: Any, kind: str, task: str) -> bool:
        if (kind, task) not in found:
            return False
        _panel(axis, found[kind, task], *_KINDS[kind])
        finish(axis, f"{task}: {kind}", "predicted best rate", "best rate found")
        return True

    kinds = list(dict.fromkeys(kind for kind, _ in found))
    tasks = [task for task in study.tasks if any(name == task for _, name in found)]
    entries = handles({str(row["method"]) for points in found.values() for row in points})
    title = (
        "Best rates found, and predicted from LoRA's as η ∝ 1/κ. Band: a factor of √10 either way; "
        "small marks: ranks below 16, large ones: above"
    )
    save(panels(spread_out(entries, kinds), tasks, paint), path, title)
    return True


def _panel(axis: Any, rows: Sequence[ReportRow], predicted: str, found: str) -> None:
    values = [float(row[name]) for row in rows for name in (predicted, found)]
    ends = [min(values) / 2.5, max(values) * 2.5]
    axis.fill_between(
        ends, [end / STEP for end in ends], [end * STEP for end in ends], color="#eeeeee", zorder=0
    )
    axis.plot(ends, ends, color="#444444", linewidth=1.0)
    for row in rows:
        x, y = float(row[predicted]), float(row[found])
        size = 6 + 2.5 * ((row["r"] > RANK) - (row["r"] < RANK))
        axis.plot(x, y, **STYLES[str(row["method"])].marks(size))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(*ends)
    axis.set_ylim(*ends)
