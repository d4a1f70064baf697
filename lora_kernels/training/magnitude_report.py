"""Magnitudes as a table, a CSV and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from .._utils.errors import needed
from .magnitude import AdapterMagnitude, LayerMagnitude

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

Rows = Sequence[LayerMagnitude | AdapterMagnitude]  # all of one kind

# The table's column titles, and the attributes that they show.
_LAYER_COLUMNS = {
    "r": "r",
    "ν[W]": "nu_weight",
    "ρ[r]": "rho",
    "Q[r]": "gain",
    "log Q": "log_gain",
    "β": "beta",
    "‖sB₀A₀‖/‖W‖": "start_ratio",
    "k₁ lora": "k1_lora",
    "k₁ pissa": "k1_pissa",
    "k₁ loram": "k1_loram",
    "ν[ΔW]": "nu_update",
}
_ADAPTER_COLUMNS = {
    "r": "r",
    "s": "scaling",
    "ν[A]": "nu_A",
    "ν[B]": "nu_B",
    "ν[sBA]": "nu_update",
    "‖sBA‖": "norm_update",
}
_BLUE, _ORANGE, _GRAY = "#0b6e99", "#e07a1f", "#7a7a7a"


def make_table(rows: Rows, title: str = "") -> Table:
    """A `rich.table.Table` with a row per layer and a row of medians, without empty columns.

    Raises:
        MissingExtraError: rich is not installed.
        ValueError: there are no rows.

    """
    table_module = needed("rich.table", "the table", "cli")
    columns = {
        head: values
        for head, values in _columns(rows).items()
        if any(value is not None for value in values)
    }
    escape = needed("rich.markup", "the table", "cli").escape  # or [r] would be a style
    table = table_module.Table(title=escape(title), title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("out × in", justify="right", no_wrap=True)
    for head in columns:
        table.add_column(escape(head), justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        shape = f"{row.out_features} × {row.in_features}"
        table.add_row(
            escape(row.name), shape, *(_short(values[index]) for values in columns.values())
        )
    if len(rows) > 1:
        table.add_section()
        table.add_row("median", "", *(_short(_median(values)) for values in columns.values()))
    return table


def write_csv(path: str | Path, rows: Rows) -> None:
    """Writes a CSV file with a column for every attribute except `gains`; floats in full precision.

    Raises:
        ValueError: there are no rows.

    """
    _columns(rows)
    names = [f.name for f in fields(rows[0]) if f.name != "gains"]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)


def draw(path: str | Path, rows: Rows, title: str = "") -> None:
    """Draws a bar for every layer; for weights also the exact Q and LoRAM's logarithm against r.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ValueError: there are no rows, or matplotlib does not support the file's extension.

    """
    needed("matplotlib", "the picture", "picture").use("Agg")
    from matplotlib import pyplot as plt

    values = _columns(rows)
    panels = _panels(rows, values)
    weights = [row for row in rows if isinstance(row, LayerMagnitude)]
    height = 2.1 * len(panels) + (3.2 if weights else 0)
    figure, axes = plt.subplots(
        len(panels) + bool(weights),
        figsize=(10, height + 0.6),
        squeeze=False,
        layout="constrained",
        height_ratios=[2.1] * len(panels) + [3.2] * bool(weights),
    )
    try:
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_bars(axis, panel)
        axes.flat[len(panels) - 1].set_xlabel(f"{len(rows)} layers, in the order of the table")
        if weights:
            _draw_gains(axes.flat[-1], weights)
        figure.suptitle(title, fontsize=11)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)


@dataclass(frozen=True)
class _Panel:
    title: str
    bars: Sequence[float | None]
    log: bool
    line: tuple[str, Sequence[float | None]] | None = None


def _panels(rows: Rows, values: dict[str, list[float | None]]) -> list[_Panel]:
    if isinstance(rows[0], AdapterMagnitude):
        return [_Panel("ν[sBA], the mean square of the product", values["ν[sBA]"], True)]
    logs = ("log Q = ln r / ln min(n, m)", values["log Q"])
    panels = [
        _Panel("ν[W], the mean square of the weight", values["ν[W]"], True),
        _Panel("Q[r], the spectral gain", values["Q[r]"], False, logs),
    ]
    if any(value is not None for value in values["ν[ΔW]"]):
        panels.append(_Panel("ν[ΔW], the mean square of the update", values["ν[ΔW]"], True))
    return panels


def _draw_bars(axis: Axes, panel: _Panel) -> None:
    positions = range(len(panel.bars))
    heights = _numbers(panel.bars)
    axis.bar(positions, heights, width=0.8, color=_BLUE, label="exact" if panel.line else None)
    # A logarithmic axis cannot show zero or non-finite values.
    if panel.log and any(0 < height < math.inf for height in heights):
        axis.set_yscale("log")
    if panel.line is not None:
        label, line = panel.line
        axis.plot(positions, _numbers(line), ".", color=_ORANGE, markersize=5, label=label)
        axis.legend(frameon=False, fontsize=8, ncols=2)
    axis.set_title(panel.title, fontsize=10, loc="left")
    axis.locator_params(axis="x", integer=True)
    axis.margins(x=0.01)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_gains(axis: Axes, rows: Sequence[LayerMagnitude]) -> None:
    """Draws all layers in gray, their median in blue, and LoRAM's logarithm for each size."""
    curves = [dict(row.gains) for row in rows if row.gains]
    for curve in curves:
        axis.plot(list(curve), list(curve.values()), color=_GRAY, alpha=0.25, linewidth=0.7)
    ranks = sorted({k for curve in curves for k in curve})
    middle = [median(curve[k] for curve in curves if k in curve) for k in ranks]
    axis.plot(ranks, middle, color=_BLUE, linewidth=2.2, label="exact Q[r], median")
    sizes = sorted({min(row.out_features, row.in_features) for row in rows} - {1})
    for index, size in enumerate(sizes):
        some = sorted({k for k in ranks if k <= size} | {size})
        label = "ln r / ln min(n, m)" if index == 0 else None
        logs = [math.log(k) / math.log(size) for k in some]
        axis.plot(some, logs, "--", color=_ORANGE, linewidth=1.4, label=label)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("r")
    axis.set_title("Q over r: each layer, and the logarithm for each size", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _columns(rows: Rows) -> dict[str, list[float | None]]:
    """The values of each column, by its title."""
    if not rows:
        raise ValueError("there are no rows to show")
    columns = _LAYER_COLUMNS if isinstance(rows[0], LayerMagnitude) else _ADAPTER_COLUMNS
    return {head: [getattr(row, name) for row in rows] for head, name in columns.items()}


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return median(known) if known else None


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
