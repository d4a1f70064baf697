"""Plots: bars with their aims marked, and maps of ratios for the grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.report import COLORS, short


@dataclass(frozen=True)
class Bar:
    """One bar; a value of NaN is shown as missing."""

    label: str
    value: float
    aim: float | None = None
    sense: str = "≤"

    @property
    def color(self) -> str:
        """The second color if the bar misses its aim, else the first."""
        if self.aim is None:
            return COLORS[0]
        good = self.value <= self.aim if self.sense == "≤" else self.value >= self.aim
        return COLORS[0 if good else 1]


def aim_bars(
    path: Path,
    title: str,
    bars: Sequence[Bar],
    xlabel: str,
    *,
    log: bool = False,
    longest: float = math.inf,
) -> None:
    """Plot horizontal bars; a black tick marks the aim, and bars that miss the aim have another
    color.

    Bars longer than `longest` are cut off there; the number beside them is the true value.
    """
    plt = _pyplot()
    height = 0.28 * len(bars) + 1.3
    figure, axis = plt.subplots(figsize=(9, height), layout="constrained")
    for position, bar in enumerate(bars):
        missing = math.isnan(bar.value)
        length = 0 if missing else min(bar.value, longest)
        axis.barh(position, length, color=bar.color, height=0.7)
        text = "no value" if missing else f" {short(bar.value)}"
        axis.annotate(text, (length, position), va="center", fontsize=8)
        if bar.aim:
            axis.plot([bar.aim] * 2, [position - 0.42, position + 0.42], color="black", lw=1.6)
    axis.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(xlabel + ("; black: the aim" if any(bar.aim for bar in bars) else ""))
    if log and any(bar.value > 0 for bar in bars):
        axis.set_xscale("log")
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path, title)


def ratio_maps(
    path: Path,
    title: str,
    maps: Mapping[str, Mapping[tuple[str, str], float]],
    axes_labels: tuple[str, str],
    *,
    columns: int = 3,
) -> None:
    """Plot one map per label, {(row, column): ratio}; 1 is white, NaN is left empty."""
    plt = _pyplot()
    count = math.ceil(len(maps) / columns)
    figure, axes = plt.subplots(
        count, columns, figsize=(3.9 * columns, 3.1 * count), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(maps) :]:
        axis.set_visible(False)
    for axis, (label, values) in zip(axes.flat, maps.items(), strict=False):
        rows = list(dict.fromkeys(row for row, _ in values))
        heads = list(dict.fromkeys(column for _, column in values))
        table = [[values.get((row, head), math.nan) for head in heads] for row in rows]
        axis.imshow(table, cmap="RdBu_r", vmin=0.5, vmax=1.5, aspect="auto")
        for i, line in enumerate(table):
            for j, value in enumerate(line):
                text = "–" if math.isnan(value) else f"{value:.2f}"
                axis.text(j, i, text, ha="center", va="center", fontsize=7)
        axis.set_xticks(range(len(heads)), heads, fontsize=8)
        axis.set_yticks(range(len(rows)), rows, fontsize=8)
        axis.set_ylabel(axes_labels[0], fontsize=8)
        axis.set_xlabel(axes_labels[1], fontsize=8)
        axis.set_title(label, fontsize=9, loc="left")
    _save(figure, path, title)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    _pyplot().close(figure)
