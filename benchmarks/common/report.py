"""The output of a benchmark: a CSV file, a table on the terminal, a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common.harness import Timing

RESULTS = Path(__file__).resolve().parents[1] / "results"
COLORS = ("#0b6e99", "#e07a1f", "#5a8f3c", "#a23b72", "#7a7a7a", "#c2a33a", "#3d405b", "#d1495b")

Row = Mapping[str, object]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write one column for every key of any row; floats get six significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)


def print_table(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows with the same keys: a column of names, then columns of numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def print_timings(console: Console, title: str, timings: Sequence[Timing], baseline: str) -> None:
    """Print the medians and the ratios to the baseline, each with its spread."""
    print_table(
        console,
        title,
        [
            {
                "variant": t.name,
                "median ms": t.failure or short(1e3 * t.median),
                "min": short(1e3 * t.quantile(0)),
                "quartiles": _spread(1e3 * t.quantile(0.25), 1e3 * t.quantile(0.75)),
                f"× {baseline}": short(t.ratio()),
                "10–90 %": _spread(t.ratio(0.1), t.ratio(0.9)),
                "rounds": str(len(t.seconds)),
            }
            for t in timings
        ],
    )


def bar_panels(
    path: Path,
    title: str,
    panels: Mapping[str, Sequence[Timing]],
    *,
    xlabel: str,
    log: bool = False,
    columns: int = 2,
) -> None:
    """Plot one panel of horizontal bars per configuration: median ms, labeled with the ratio.

    Variants whose names begin with the same word have the same color.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = math.ceil(len(panels) / columns)
    height = 0.34 * max(len(timings) for timings in panels.values()) + 0.9
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.2 * columns, height * rows), squeeze=False, layout="constrained"
    )
    families = dict.fromkeys(t.family for timings in panels.values() for t in timings)
    color = {family: COLORS[i % len(COLORS)] for i, family in enumerate(families)}
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (label, timings) in zip(axes.flat, panels.items(), strict=False):
        positions = range(len(timings))
        values = [0.0 if t.failure else 1e3 * t.median for t in timings]
        axis.barh(positions, values, color=[color[t.family] for t in timings], height=0.7)
        axis.set_yticks(positions, [t.name for t in timings])
        axis.invert_yaxis()
        axis.set_title(label, fontsize=10, loc="left")
        axis.set_xlabel(xlabel)
        axis.spines[["top", "right"]].set_visible(False)
        if log:
            axis.set_xscale("log")
        axis.margins(x=0.3 if log else 0.22)
        left = axis.get_xlim()[0]
        for position, timing, value in zip(positions, timings, values, strict=True):
            text = "fails" if timing.failure else f" {short(value)} ms  ({short(timing.ratio())}×)"
            axis.text(value or left, position, text, va="center", fontsize=8)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def _plain(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def short(value: float) -> str:
    """Three significant digits, never an exponent: 0.174, 12.3, 12,345; empty for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _spread(low: float, high: float) -> str:
    return f"{short(low)}–{short(high)}".strip("–")
