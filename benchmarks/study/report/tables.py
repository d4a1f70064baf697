"""The tables of docs/study.md in Markdown, by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from benchmarks.study.methods import FULL, METHODS, RANK
from benchmarks.study.report.cells import PLANNED, TASKS, Study
from benchmarks.study.report.hypotheses import EVERYTHING, findings
from benchmarks.study.report.methods import ReportRow, confirmation_rows, method_rows
from benchmarks.study.report.rates import rate_rows

NOTHING = "None of these runs is finished."
AT_END = "†: the lowest or the highest rate that ran."
CLIPPED = "≥: the grid ends before the range does."

_DIFFERENCE = "difference from LoRA (95 % interval)"
_TASK_HEADS = (
    *("method", "s", "best rate", "loss", _DIFFERENCE, "verdict", "metric"),
    *("decades within 1 %", "steps to LoRA's loss", "update", "start, s"),
)
_RANK_HEADS = ("task", "method", "r", "s", "best rate", "loss", _DIFFERENCE, "verdict")
_CONFIRMATION_HEADS = (
    *("task", "method", "s", "best rate", "loss", _DIFFERENCE, "verdict", "metric"),
    "difference from PiSSA (95 % interval)",
)
_RATE_HEADS = (
    *("task", "method", "r", "s", "κ", "best rate", "predicted", "found / predicted"),
    *("between rates", "found / predicted, between", "best rate · κ"),
)
_FINDING_HEADS = ("", "where", "number", "value", "rule", "verdict", "cells", "from")


def tables(study: Study) -> dict[str, str]:
    """The tables of each task, of the ranks, the rates and the hypotheses, by name."""
    rows = method_rows(study)
    found = {task: _of_task(study, task, rows) for task in TASKS}
    found["confirmation"] = _of_confirmation(confirmation_rows(study))
    found["ranks"] = _of_ranks(rows)
    found["rates"] = _of_rates(rate_rows(study))
    found["hypotheses"] = _of_hypotheses(study)
    return found


def _of_task(study: Study, task: str, rows: Sequence[ReportRow]) -> str:
    own = [row for row in rows if row["task"] == task and row["r"] == RANK]
    lines: list[tuple[object, ...]] = [
        (
            *(row["title"], _scaling(row), _rate(row), _number(row, "loss", ".4f")),
            *(_difference(row), row["verdict"], _percent(row), _width(row), _steps(row)),
            *(_number(row, "relative_update", ".2g"), _seconds(row)),
        )
        for row in own
    ]
    if lines:
        lines.insert(0, _untouched(study, task))
    return _table(_TASK_HEADS, lines, own)


def _untouched(study: Study, task: str) -> tuple[object, ...]:
    """The model before training: the same for all methods, except for the noise of Init[AB+]."""
    first = next(own for own in study.cells if own.cell.task == task and own.finished)
    row = next(iter(first.runs.values()))
    facts: ReportRow = {"loss": float(row["start_loss"]), "metric": float(row["start_metric"])}
    known = ("untouched model", "", "", _number(facts, "loss", ".4f"), "", "", _percent(facts))
    return (*known, *([""] * (len(_TASK_HEADS) - len(known))))


def _of_confirmation(rows: Sequence[ReportRow]) -> str:
    """The table of the fresh seeds."""
    lines = [
        (
            *(row["task"], row["title"], _scaling(row), _rate(row), _number(row, "loss", ".4f")),
            *(_difference(row), row["verdict"], _percent(row)),
            _between(row, "difference_from_pissa_percent", "low_pissa", "high_pissa"),
        )
        for row in rows
    ]
    return _table(_CONFIRMATION_HEADS, lines, rows)


def _of_ranks(rows: Sequence[ReportRow]) -> str:
    """The cells of the methods that also run at other ranks, including r = 16."""
    methods = {(cell.task, cell.method) for cell in PLANNED if cell.r != RANK}
    own = [row for row in rows if (row["task"], row["method"]) in methods]
    if all(row["r"] == RANK for row in own):
        own = []
    order = list(METHODS)
    own.sort(key=lambda row: (TASKS.index(row["task"]), order.index(row["method"]), row["r"]))
    lines = [
        (
            *(row["task"], row["title"], row["r"], _scaling(row), _rate(row)),
            *(_number(row, "loss", ".4f"), _difference(row), row["verdict"]),
        )
        for row in own
    ]
    return _table(_RANK_HEADS, lines, own)


def _of_rates(rows: Sequence[ReportRow]) -> str:
    lines = [
        (
            *(row["task"], row["title"], row["r"], _scaling(row)),
            *(_number(row, "step_size", ".3g"), _rate(row), _number(row, "predicted_rate", ".2e")),
            *(_number(row, "ratio", ".2f"), _number(row, "interpolated_rate", ".2e")),
            *(
                _number(row, "interpolated_ratio", ".2f"),
                _number(row, "rate_times_step_size", ".1e"),
            ),
        )
        for row in rows
    ]
    return _table(_RATE_HEADS, lines, rows)


def _of_hypotheses(study: Study) -> str:
    lines = []
    for found in findings(study):
        value = "" if found.value is None else f"{found.value:.3g}"
        strong = "**" if found.scope == EVERYTHING else ""
        texts = (f"{strong}{found.quantity}{strong}", value, found.bound)
        verdict = f"{strong}{found.verdict}{strong}"
        lines.append((found.hypothesis, found.scope, *texts, verdict, found.cells, found.detail))
    return _table(_FINDING_HEADS, lines, ())


def _table(
    heads: Sequence[str], lines: Iterable[Sequence[object]], rows: Sequence[ReportRow]
) -> str:
    """A table in Markdown, with notes that explain its marks."""
    body = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    if not body:
        return NOTHING
    notes = [AT_END] if any(row.get("at_grid_end") == "yes" for row in rows) else []
    if "decades within 1 %" in heads and any(row.get("width_clipped") for row in rows):
        notes.append(CLIPPED)
    table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *body]
    return "\n".join([*table, *(["", " ".join(notes)] if notes else [])])


def _scaling(row: ReportRow) -> str:
    return "" if row["method"] == FULL else f"{row['scaling']:.3g}"


def _rate(row: ReportRow) -> str:
    if "rate" not in row:
        return ""
    return f"{row['rate']}{' †' if row['at_grid_end'] == 'yes' else ''}"


def _number(row: ReportRow, column: str, form: str) -> str:
    value = row.get(column)
    return "" if value is None or math.isnan(float(value)) else format(value, form)


def _percent(row: ReportRow) -> str:
    return f"{100 * float(row['metric']):.1f} %" if "metric" in row else ""


def _difference(row: ReportRow) -> str:
    return _between(row, "difference_percent", "low", "high")


def _between(row: ReportRow, *names: str) -> str:
    """A difference with its interval; empty if there is none."""
    if names[0] not in row:
        return ""
    mean, low, high = (_signed(row[name]) for name in names)
    return f"{mean} % ({low} to {high})"


def _width(row: ReportRow) -> str:
    if "width_decades" not in row:
        return ""
    return f"{'≥ ' if row['width_clipped'] else ''}{row['width_decades']:.2f}"


def _steps(row: ReportRow) -> str:
    steps = row.get("steps_to_lora", "")
    return f"{steps:.1f}" if isinstance(steps, float) else str(steps)


def _seconds(row: ReportRow) -> str:
    return _number(
        row, "start_seconds", ".2g" if float(row.get("start_seconds", 0)) < 10 else ".0f"
    )


def _signed(value: object) -> str:
    return f"{value:+.2f}"
