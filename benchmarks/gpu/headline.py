"""The targets in one table: aim, prediction and measurement."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from benchmarks.common.report import print_table, write_csv
from benchmarks.gpu.pictures import Bar, aim_bars
from benchmarks.gpu.session import SKIPPED, Session, cell
from benchmarks.gpu.targets.costs import MACHINES
from benchmarks.gpu.targets.plan import Plan
from benchmarks.gpu.targets.predict import Line, lines

HEADS = {
    "line": "line",
    "aim": "aim",
    "predicted": "predicted",
    "predicted_ms": "ms",
    "floor_ms": "floor ms",
    "measured": "measured",
    "measured_ms": "ms measured",
    "met": "met",
    "causes": "predicted, % by cause",
}
_KEPT = ("measured", "measured_ms", "met", "measured_on")


def write_prediction(console: Console, out: Path, plan: Plan) -> None:
    """Write <device>/predicted.csv for each known device, with empty columns for measurements."""
    for machine in MACHINES:
        rows = [line.row() for line in lines(machine, plan)]
        write_csv(out / machine.name / "predicted.csv", rows)
        show(console, f"Predicted for {machine.name}; nothing is measured", rows)


def write_headline(session: Session) -> None:
    """Write headline.csv and .png. Targets that this run skipped keep their earlier measurements.

    The predictions are computed from the ceilings measured in this run.
    """
    path, earlier = session.out / "headline.csv", session.earlier
    known = lines(session.machine, session.plan)
    rows = [_row(session, line, earlier.get(line.name, {})) for line in known]
    write_csv(path, [{**row, **session.environment} for row in rows])
    title = f"Targets, {session.environment['device']}"
    now = [row for row in rows if row["line"] in session.measured]
    show(session.console, f"{title}; predictions from its measured ceilings", now)
    bars = list(_bars(known, rows))
    aim_bars(session.out / "headline.png", title, bars, "part of the limit", longest=2.0)


def show(console: Console, title: str, rows: Iterable[dict[str, object]]) -> None:
    """Print a table."""
    cells = [{head: cell(row[key]) for key, head in HEADS.items()} for row in rows]
    print_table(console, title, cells)


def _row(session: Session, line: Line, earlier: dict[str, str]) -> dict[str, object]:
    row = {**line.row(), "measured_on": ""}
    value, milliseconds = session.measured.get(line.name, (SKIPPED, None))
    if value == SKIPPED:
        return row | {key: _number(earlier.get(key, "")) for key in _KEPT}
    row |= {"measured": value, "measured_on": f"{session.started:%Y-%m-%d %H:%M} UTC"}
    if milliseconds is not None:
        row["measured_ms"] = milliseconds
    if isinstance(value, float):
        row["met"] = "yes" if line.met(value) else "NO"
    return row


def _bars(known: Iterable[Line], rows: Iterable[dict[str, object]]) -> Iterable[Bar]:
    """Bars in units of the aim: above 1 misses it, for upper and lower limits alike."""
    for line, row in zip(known, rows, strict=True):
        value = row["measured"]
        if not line.aim:
            continue
        if not isinstance(value, float) or not value:
            share = float("nan")
        else:
            share = value / line.aim if line.sense == "≤" else line.aim / value
        yield Bar(line.name, share, 1.0)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
