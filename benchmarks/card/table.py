"""The tables printed at the end of a call: the parts, then the targets with their measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

SHOWN = 30  # failing tests that are printed; failed.txt lists all of them


def report(
    outcomes: Sequence,
    headline: Sequence[Mapping[str, str]],
    failing: Sequence[str],
    started: datetime,
) -> str:
    """The whole report, with the targets last."""
    lines = [f"failing: {test}" for test in failing[:SHOWN]]
    if len(failing) > SHOWN:
        lines.append(f"and {len(failing) - SHOWN} more: failed.txt has all")
    parts = [
        (o.part, o.result, "" if o.seconds is None else f"{o.seconds:.0f}", o.said)
        for o in outcomes
    ]
    lines += ["", *table(("part", "result", "seconds", "said last"), parts)]
    rows = [targets(row, f"{started:%Y-%m-%d %H:%M} UTC") for row in headline]
    lines += ["", *table(("headline", "aim", "measured", "met"), rows)]
    return "\n".join(lines if rows else [*lines, "no headline was measured"])


def targets(row: Mapping[str, str], started: str) -> tuple[str, ...]:
    """The cells of one row of headline.csv; the date is added to an earlier measurement."""
    measured, when = row.get("measured", ""), row.get("measured_on", "")
    try:
        measured = f"{float(measured):.4g}"
    except ValueError:
        measured = measured[:60] or "not measured"
    if when and when < started:
        measured += f" (earlier: {when})"
    return row["line"], row["aim"], measured, row.get("met", "")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of text."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()

    return [line(heads), "-+-".join("-" * width for width in widths), *map(line, rows)]
