"""rates.csv: the best rates that were found, and the rates that theory predicts from LoRA's.

An Adam step at the rate η changes W by a matrix of root mean square η·κ, so best rate · κ would be
the same for all methods (hypothesis 2 of docs/study.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study.methods import METHODS, REFERENCE
from benchmarks.study.plan import best_rate
from benchmarks.study.report.cells import Measured, Study
from benchmarks.study.report.methods import ReportRow
from benchmarks.study.report.statistics import geometric_mean, spread, vertex
from benchmarks.study.store import rate_name

RATE_COLUMNS = (
    *("task", "method", "title", "r", "scaling", "step_size", "rate", "at_grid_end"),
    *("predicted_rate", "ratio", "rate_times_step_size", "interpolated_rate"),
    *("interpolated_predicted_rate", "interpolated_ratio", "interpolated_times_step_size"),
)


def rate_rows(study: Study) -> list[ReportRow]:
    """One row for each tuned cell, task by task; fields that do not apply are empty.

    `predicted_rate` is LoRA's best rate on the task at r = 16 times κ_LoRA/κ, and `ratio` is the
    found rate over the predicted rate. The columns `interpolated_...` are the same for best rates
    interpolated between the rates of the grid, LoRA's included.
    """
    return [_row(own, study.get(own.cell.task, REFERENCE)) for own in study.tuned]


def _row(own: Measured, lora: Measured | None) -> ReportRow:
    found, between = own.best_rate, interpolated_rate(own)
    row: ReportRow = {
        "task": own.cell.task,
        "method": own.cell.method,
        "title": METHODS[own.cell.method].title,
        "r": own.cell.r,
        "scaling": own.mean_at_best("scaling"),
        "step_size": own.mean_at_best("step_size"),
        "rate": rate_name(found),
        "at_grid_end": "yes" if own.at_grid_end else "no",
        "rate_times_step_size": found * own.mean_at_best("step_size"),
    }
    if lora is not None:
        predicted = lora.best_rate * _smaller_steps(lora, own)
        row |= {"predicted_rate": predicted, "ratio": found / predicted}
    if between is not None:
        row |= {
            "interpolated_rate": between,
            "interpolated_times_step_size": between * own.mean_at_best("step_size"),
        }
    if lora is not None and (of_lora := interpolated_rate(lora)) is not None:
        predicted = of_lora * _smaller_steps(lora, own)
        row["interpolated_predicted_rate"] = predicted
        if between is not None:
            row["interpolated_ratio"] = between / predicted
    return row


def _smaller_steps(lora: Measured, own: Measured) -> float:
    """κ_LoRA/κ."""
    return lora.mean_at_best("step_size") / own.mean_at_best("step_size")


def interpolated_rate(own: Measured) -> float | None:
    """The rate at the minimum of a parabola in log η through the losses of the best rate and its
    two neighbors. The losses are means over the seeds if all three rates have all seeds, otherwise
    the first seed's losses around its own best. None at an end of the grid or next to a diverged
    run.
    """
    first = own.first
    for losses, center in ((own.means, own.best), (first, best_rate(first))):
        ran = sorted(first)
        at = ran.index(center) if center in ran else 0
        around = ran[at - 1 : at + 2] if 0 < at < len(ran) - 1 else []
        if around and set(around) <= losses.keys():
            found = vertex([(k / 2, losses[k]) for k in around])
            return None if found is None else 10**found
    return None


def step_summaries(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """The geometric mean c of best rate · κ for each task and for all, and the factor f such that
    90 % of the cells lie between c/f and c·f; for best rates on the grid, and for interpolated
    ones.
    """
    tasks = list(dict.fromkeys(str(row["task"]) for row in rows))
    summaries = []
    for name in [*tasks, "all"] if len(tasks) > 1 else tasks:
        own = [row for row in rows if name in ("all", row["task"])]
        summary: ReportRow = {"task": name, "cells": len(own)}
        for column in ("rate_times_step_size", "interpolated_times_step_size"):
            values = [float(row[column]) for row in own if column in row]
            kind = "" if column.startswith("rate") else "interpolated "
            summary[f"{kind}c"] = geometric_mean(values) if values else None
            summary[f"{kind}f"] = spread(values) if values else None
        summaries.append(summary)
    return summaries
