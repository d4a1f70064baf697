"""The tables and figures of all finished runs: `python -m benchmarks.study.report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.common.document import marked
from benchmarks.common.report import print_table, short, write_csv
from benchmarks.study.report.cells import Study, read_study
from benchmarks.study.report.figures import draw
from benchmarks.study.report.hypotheses import EVERYTHING, Finding, findings
from benchmarks.study.report.methods import (
    CONFIRMATION_COLUMNS,
    METHOD_COLUMNS,
    ReportRow,
    confirmation_rows,
    method_rows,
)
from benchmarks.study.report.rates import RATE_COLUMNS, rate_rows, step_summaries
from benchmarks.study.report.tables import tables


def write_report(folder: Path, console: Console) -> None:
    """From all rows in `folder`, write methods.csv, rates.csv, hypotheses.csv, table.md and the
    figures into the same folder, and print the results.

    A cell whose grid or seeds are unfinished is only in loss_vs_rate.png. Nothing is written if
    nothing has run.

    Raises:
        ValueError: a file's columns are not those of this version, or a method is unknown.

    """
    study = read_study(folder)
    if not study.cells:
        console.print(f"Nothing has run: there are no rows in {folder}.")
        return
    methods, rates, decided = method_rows(study), rate_rows(study), findings(study)
    _write(folder / "methods.csv", METHOD_COLUMNS, methods)
    if confirmed := confirmation_rows(study):
        _write(folder / "confirmation.csv", CONFIRMATION_COLUMNS, confirmed)
    _write(folder / "rates.csv", RATE_COLUMNS, rates)
    write_csv(folder / "hypotheses.csv", [vars(finding) for finding in decided])
    made = [marked(name, table) for name, table in tables(study).items()]
    (folder / "table.md").write_text("\n\n".join(made) + "\n", encoding="utf-8")
    drawn = draw(study, folder)
    _print_methods(console, methods)
    _print_findings(console, decided)
    _print_missing(console, study)
    console.print(f"Written to {folder}, with the figures {', '.join(drawn)}.")
    _print_summaries(console, rates)


def _write(path: Path, columns: Sequence[str], rows: Sequence[ReportRow]) -> None:
    write_csv(path, [{name: row.get(name, "") for name in columns} for row in rows])


def _print_methods(console: Console, rows: Sequence[ReportRow]) -> None:
    """A table for each task and rank."""
    for task, r in dict.fromkeys((row["task"], row["r"]) for row in rows):
        lines = [_method_line(row) for row in rows if (row["task"], row["r"]) == (task, r)]
        print_table(console, f"{task}, r = {r}: each method at its best rate", lines)


def _method_line(row: ReportRow) -> dict[str, str]:
    return {
        "method": str(row["title"]),
        "rate": str(row.get("rate", "")),
        "loss": f"{row['loss']:.4f}" if "loss" in row else "",
        "% from LoRA": _text(row.get("difference_percent")),
        "": str(row["verdict"]),
        "diverged": str(row["diverged"]),
    }


def _print_findings(console: Console, decided: Sequence[Finding]) -> None:
    """Print the findings with a verdict; the others are only in the files."""
    for found in (found for found in decided if found.verdict):
        if found.scope == EVERYTHING:
            text = f"Hypothesis {found.hypothesis}, {found.quantity}: {found.verdict}"
            console.print(text, style="bold", highlight=False)
        else:
            value = _text(found.value) or "no value yet"
            text = f"  {found.scope}, {found.quantity}: {value} ({found.bound}): {found.verdict}"
            console.print(text, highlight=False)


def _print_missing(console: Console, study: Study) -> None:
    for own in study.unfinished:
        console.print(f"Unfinished: {own.cell.title} ({len(own.runs)} runs)", highlight=False)
    for own in study.cells:
        if own.finished and own.best is None:
            console.print(f"No rate that trains with all seeds: {own.cell.title}", highlight=False)


def _print_summaries(console: Console, rates: Sequence[ReportRow]) -> None:
    """c, the geometric mean of best rate · κ, and f: 90 % of the cells lie between c/f and c·f."""
    summaries = step_summaries(rates)
    if summaries:
        lines = [{name: _text(value) for name, value in summary.items()} for summary in summaries]
        print_table(console, "Best rate · κ: geometric mean c, and c/f to c·f has 90 %", lines)


def _text(value: object) -> str:
    """Three digits, with a power of ten if small; empty for None."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.2e}" if 0 < abs(value) < 1e-2 else short(value)
