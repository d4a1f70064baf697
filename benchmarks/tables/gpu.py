"""The targets on a GPU, and the host's time beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from .aims import where_bold
from .markdown import bold, number, page, percent, table
from .results import Results, Row, float_of, paths, wrapped

PREDICTED, MEASURED = "predicted.csv", "headline.csv"


def gpu_targets(results: Results) -> str:
    """Aims, predictions and measurements. A measured GPU has a headline.csv."""
    sources = results.matching(f"nvidia-*/{PREDICTED}")[::-1]  # the newest GPU first
    files = results.matching(f"nvidia-*/{MEASURED}")
    predicted, measured = ([_by_line(results.rows(f)) for f in some] for some in (sources, files))
    lines = []
    for name, row in predicted[0].items():
        sense, aim, unit = row["aim"].split(" ", 2)
        cells = [_cell(row["aim"], rows.get(name, {}), "predicted") for rows in predicted]
        cells += [_cell(row["aim"], rows.get(name, {}), "measured") for rows in measured]
        lines.append([name, f"{sense} {_in(unit, float(aim), aim=True)}", *cells])
        lines[-1] += [] if measured else [""]
    heads = ["target", "aim", *(f"predicted, {_gpu(file)}" for file in sources)]
    heads += [f"measured, {_gpu(file)}" for file in files] or ["measured"]
    note = f"{where_bold(lines)}. Predictions: {paths(sources)}."
    if not files:
        return page(table(heads, lines), wrapped(f"{note} Nothing is measured yet."))
    return page(table(heads, lines), results.caption(files, f"{note} Measured:"))


def _by_line(rows: Sequence[Row]) -> dict[str, Row]:
    return {row["line"]: row for row in rows}


def _gpu(file: str) -> str:
    """`nvidia-h200/predicted.csv` -> "H200"."""
    return PurePosixPath(file).parent.name.removeprefix("nvidia-").upper()


def _in(unit: str, value: float, aim: bool = False) -> str:
    """A value in the unit of the aim."""
    if unit == "of copy":
        return f"{value:.0%}".replace("%", " %") + " of copy" if aim else percent(value, 1)
    text = f"{value:,g}" if aim or unit == "cells" else number(value)
    if unit.startswith("×"):
        return f"{text} {unit if aim else '×'}"
    return f"{text} {unit}"


def _cell(aim: str, row: Row, column: str) -> str:
    """A prediction or a measurement, with its milliseconds; or the reason why it is missing."""
    text, ms = row.get(column, ""), float_of(row.get(f"{column}_ms"))
    value = float_of(text)
    if value is None:
        return " ".join(text.split())[:60].replace("|", r"\|")
    sense, limit, unit = aim.split(" ", 2)
    missed = value > float(limit) if sense == "≤" else value < float(limit)
    after = "" if ms is None or unit == "ms" else f", {number(ms)} ms"
    return bold(_in(unit, value), missed) + after


def host(results: Results) -> str:
    """The host's time for a forward of the layer, and until the launches of an initialization."""
    columns = ("total_us", "pytorch_us", "ours_us", "linear_us")
    lines = []
    for row in results.rows("host.csv"):
        what = f"{row['tokens']} token{'s' * (row['tokens'] != '1')}, r = {row['r']}"
        cells = [number(float_of(row[column])) for column in columns]
        lines.append([f"{what}, {row['mode']}, {row['way']}", *cells, row["launches"]])
    launches = []
    for row in results.rows("host_init.csv"):
        at, aim = float_of(row["median_us"]), float_of(row["aim_us"])
        missed = at is not None and aim is not None and at > aim
        launches.append(
            [f"`{row['launch']}`", bold(number(at), missed), "" if aim is None else number(aim)]
        )
    first = results.rows("host_init.csv")[0]
    what = f"the last launch in `loram_init_foreach`, {first['weights']} weights, r = {first['r']}"
    heads = [
        "forward of a layer, µs",
        "all",
        "PyTorch's dispatch",
        "ours",
        "`nn.Linear`",
        "launches",
    ]
    return page(
        table(heads, lines),
        table([what, "µs after the call", "aim"], launches),
        results.caption(["host.csv", "host_init.csv"], f"{where_bold(launches)}."),
    )
