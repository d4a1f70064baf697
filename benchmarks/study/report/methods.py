"""methods.csv: what each method reached at its best rate, and how far that is from LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.study.methods import METHODS, RANK, REFERENCE
from benchmarks.study.plan import FRESH_SEEDS, SEEDS, Cell
from benchmarks.study.report.cells import Measured, Study
from benchmarks.study.report.comparisons import Comparison, compare_with_lora, confirm
from benchmarks.study.report.statistics import first_reaching, width_near_best
from benchmarks.study.store import rate_name

ReportRow = dict[str, Any]
DIVERGED = "diverged"  # the verdict on a cell in which every finalist diverged with some seed
NO_REFERENCE = "no reference"  # LoRA of that task and rank is not finished
METHOD_COLUMNS = (
    *("task", "method", "title", "r", "scaling", "rate", "at_grid_end", "loss", "metric"),
    *("difference_percent", "low", "high", "p", "p_holm", "verdict", "seeds"),
    *("width_decades", "width_clipped", "steps_to_lora", "relative_update"),
    *("start_seconds", "start_mib", "runs", "diverged"),
)


def method_rows(study: Study) -> list[ReportRow]:
    """One row for each finished cell, task by task; fields that do not apply are empty.

    - `rate`: the best; `at_grid_end`: whether it is the lowest or the highest that ran.
    - `loss`, `metric`, `relative_update` = √(ν[ΔW]/ν[W]): means over the seeds at the best rate.
    - `difference_percent`, `low`, `high`, `p`: the difference of the final loss from LoRA's (B = 0)
      on the same task at the same rank, paired by seed, with the ends of the 95 % interval.
      `p_holm` is adjusted over the comparisons of the task at r = 16, or over those of all other
      ranks.
    - `width_decades`: of the range of rates within 1 % of the best, first seed; `width_clipped`:
      at which ends of the grid it is cut off.
    - `steps_to_lora`: until the mean held-out loss is at LoRA's mean final loss.
    - `start_seconds`, `start_mib`: the time and memory of the start, medians over the seeds.
    """
    comparisons = compare_with_lora(study)
    return [_row(study, own, comparisons) for own in study.cells if own.finished]


CONFIRMATION_COLUMNS = (
    *("task", "method", "title", "r", "scaling", "rate", "loss", "metric"),
    *("difference_percent", "low", "high", "p", "p_holm", "verdict"),
    *("difference_from_pissa_percent", "low_pissa", "high_pissa", "seeds"),
)


def confirmation_rows(study: Study) -> list[ReportRow]:
    """One row for each cell that has run with the fresh seeds at the rate that the first three
    seeds chose. It has the columns of `method_rows`, computed from the fresh seeds alone, and the
    difference from PiSSA.
    """
    with_lora, with_pissa = confirm(study), confirm(study, "pissa")
    rows = []
    for own in study.tuned:
        if own.cell.r != RANK or not (own.fresh("loss") or own.fresh_diverged):
            continue
        row = {
            "task": own.cell.task,
            "method": own.cell.method,
            "title": METHODS[own.cell.method].title,
            "r": own.cell.r,
            "scaling": own.mean_at_best("scaling"),
            "rate": rate_name(own.best_rate),
            "at_grid_end": "yes" if own.at_grid_end else "no",
            "seeds": len(FRESH_SEEDS),
        }
        if own.fresh_diverged:
            rows.append(row | {"verdict": f"{own.fresh_diverged} of {len(FRESH_SEEDS)} diverged"})
            continue
        row |= {
            "loss": float(np.mean(own.fresh("loss"))),
            "metric": float(np.mean(own.fresh("metric"))),
            **_against_lora(study, own.cell, with_lora),
        }
        if own.cell in with_pissa:
            mean, low, high, _ = with_pissa[own.cell].difference
            row |= {"difference_from_pissa_percent": mean, "low_pissa": low, "high_pissa": high}
        rows.append(row)
    return rows


def _row(study: Study, own: Measured, comparisons: Mapping[Cell, Comparison]) -> ReportRow:
    cell = own.cell
    facts = {
        "task": cell.task,
        "method": cell.method,
        "title": METHODS[cell.method].title,
        "r": cell.r,
        "scaling": float(next(iter(own.runs.values()))["scaling"]),
        "runs": len(own.runs),
        "diverged": own.diverged,
        "seeds": len(SEEDS),
    }
    if own.best is None:
        return facts | {"verdict": DIVERGED}
    return {
        **facts,
        "rate": rate_name(own.best_rate),
        "at_grid_end": "yes" if own.at_grid_end else "no",
        "loss": own.mean_at_best("loss"),
        "metric": own.mean_at_best("metric"),
        **_against_lora(study, cell, comparisons),
        **_width(own),
        "steps_to_lora": _steps_to_lora(own, study.reference(cell)),
        "relative_update": float(np.mean(relative_updates(own))),
        "start_seconds": float(np.median(own.at_best("start_seconds"))),
        "start_mib": float(np.median(own.at_best("start_mib"))),
    }


def relative_updates(own: Measured) -> list[float]:
    """√(ν[ΔW]/ν[W]) at the end of the runs at the best rate, seed by seed."""
    both = zip(own.at_best("nu_update"), own.at_best("nu_weight"), strict=True)
    return [math.sqrt(update / weight) for update, weight in both]


def _against_lora(study: Study, cell: Cell, comparisons: Mapping[Cell, Comparison]) -> ReportRow:
    if cell not in comparisons:
        missing = cell.method != REFERENCE and study.reference(cell) is None
        return {"verdict": NO_REFERENCE if missing else ""}
    (mean, low, high, p), p_holm = comparisons[cell]
    return {
        "difference_percent": mean,
        "low": low,
        "high": high,
        "p": p,
        "p_holm": p_holm,
        "verdict": comparisons[cell].verdict,
    }


def _width(own: Measured) -> ReportRow:
    width = width_near_best({k / 2: loss for k, loss in own.first.items()})
    ends = {"low": width.clipped_low, "high": width.clipped_high}
    clipped = " and ".join(end for end, is_clipped in ends.items() if is_clipped)
    return {"width_decades": width.decades, "width_clipped": clipped}


def _steps_to_lora(own: Measured, reference: Measured | None) -> float | str:
    """Empty if there is no reference or no curve, "never" if the loss stays above it."""
    if reference is None or not own.mean_curve():
        return ""
    steps = first_reaching(own.mean_curve(), reference.mean_at_best("loss"))
    return "never" if steps is None else steps
