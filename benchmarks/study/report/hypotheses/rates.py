"""Hypotheses 2 and 5: what the best rates depend on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from benchmarks.study.methods import METHODS, RANK, REFERENCE
from benchmarks.study.plan import Cell
from benchmarks.study.report.cells import PLANNED, Measured, Study
from benchmarks.study.report.hypotheses.finding import (
    Finding,
    counted,
    for_all,
    for_some,
    for_whole,
    missing,
    planned,
)
from benchmarks.study.report.methods import ReportRow
from benchmarks.study.report.rates import interpolated_rate, rate_rows

APART = 10.0  # hypothesis 2: the best rates differ by more than this factor
STEP = math.sqrt(10)  # of the grid
ROUNDING = 2e-3  # of a ratio of rates, which have three digits
# Hypothesis 5: in theory, the best rate is proportional to r^(-1/2) if s does not depend on r, and
# does not depend on r if s is proportional to 1/√r. The nearer exponent decides.
HALFWAY = 0.25
DEPENDS = {"rslora": False, REFERENCE: True}


def differ_as_predicted(study: Study, task: str) -> list[Finding]:
    """Hypothesis 2 on a task, at r = 16: the largest best rate is more than ten times the smallest,
    and each is within √10 of the rate predicted from LoRA's.
    """
    cells = planned(task, METHODS)
    left = missing(study, cells)
    rows = [r for r in rate_rows(study) if r["task"] == task and r["r"] == RANK]
    return [_apart(rows, task, cells, left), _within(rows, task, cells, left)]


def _apart(
    rows: Sequence[ReportRow], task: str, cells: Sequence[Cell], left: Sequence[Cell]
) -> Finding:
    by_rate = sorted(rows, key=lambda row: float(row["rate"]))
    value, detail = None, ""
    if by_rate:
        low, high = by_rate[0], by_rate[-1]
        value = float(high["rate"]) / float(low["rate"])
        detail = f"{low['title']} {low['rate']}, {high['title']} {high['rate']}"
    return Finding(
        *(2, task, "largest best rate / smallest", value, f"> {APART:g}", detail),
        cells=counted(cells, left),
        verdict=for_some(value is not None and value > APART * (1 + ROUNDING), left),
    )


def _within(
    rows: Sequence[ReportRow], task: str, cells: Sequence[Cell], left: Sequence[Cell]
) -> Finding:
    ratios = {str(row["title"]): float(row["ratio"]) for row in rows if "ratio" in row}
    value, detail = None, ""
    outside: list[str] = []
    if ratios:
        off = {title: max(ratio, 1 / ratio) for title, ratio in ratios.items()}
        farthest = max(off, key=lambda title: off[title])
        value = off[farthest]
        outside = [title for title in off if off[title] > STEP * (1 + ROUNDING)]
        inside = f"{len(off) - len(outside)} of {len(off)} are within √10"
        detail = f"{farthest}, found / predicted = {ratios[farthest]:.3g}; {inside}"
    return Finding(
        *(2, task, "farthest best rate from its prediction, times", value, "≤ √10", detail),
        cells=counted(cells, left),
        verdict=for_all(not outside, left),
    )


def rank_tasks() -> list[str]:
    """The tasks on which several ranks are planned."""
    return list(dict.fromkeys(cell.task for cell in PLANNED if cell.r != RANK))


def depend_on_rank(study: Study, task: str) -> list[Finding]:
    """Hypothesis 5 on a task, decided by the slope of the log of the interpolated best rate over
    log r: RsLoRA's slope is nearer to 0 than to ± 1/2, and LoRA's slope is not. Other methods are
    shown for comparison.
    """
    ranks = sorted({c.r for c in PLANNED if c.task == task})
    methods = [m for m in METHODS if len(planned(task, (m,), ranks)) == len(ranks)]
    first = [m for m in DEPENDS if m in methods]
    others = [m for m in methods if m not in DEPENDS]
    return [_slope(study, task, method, ranks) for method in [*first, *others]]


def _slope(study: Study, task: str, method: str, ranks: list[int]) -> Finding:
    cells = planned(task, (method,), ranks)
    left = missing(study, cells)
    tuned = {r: own for r in ranks if (own := study.get(task, method, r)) is not None}
    between = {r: at for r, own in tuned.items() if (at := interpolated_rate(own)) is not None}
    value = None
    if len(between) == len(ranks):
        value = float(np.polyfit(np.log(list(between)), np.log(list(between.values())), 1)[0])
    verdict, bound = "", ""
    if method in DEPENDS:
        bound = f"{'≥' if DEPENDS[method] else '<'} {HALFWAY:g} in size"
        depends = value is not None and abs(value) >= HALFWAY
        verdict = for_whole(depends == DEPENDS[method], left)
        if value is None and not left:
            verdict = "not decided: no minimum between the rates of the grid at some rank"
    return Finding(
        *(5, task, f"slope of log best rate over log r, {METHODS[method].title}", value, bound),
        detail=_listed(tuned, between),
        cells=counted(cells, left),
        verdict=verdict,
    )


def _listed(tuned: dict[int, Measured], between: dict[int, float]) -> str:
    """The best rates on the grid and the interpolated ones, rank by rank."""
    parts = []
    for r, own in tuned.items():
        inner = f" ({between[r]:.2e})" if r in between else ""
        parts.append(f"r = {r}: {own.best_rate:.2e}{inner}")
    return ", ".join(parts)
