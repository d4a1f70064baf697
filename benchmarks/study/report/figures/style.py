"""The look of each method in all figures, and the layout and saving of figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.study.methods import ABLATIONS, CORE, FULL, METHODS, REFERENCE, RIVALS

TEXT = 8  # points
_LETTERS = 11  # letters of a title per inch
_LINE = 110  # letters in a line of a title, at most
WIDTH, HEIGHT, LEGEND = 4.0, 3.2, 2.0  # of a panel and a legend, in inches
# Okabe and Ito's colors for color-blind readers, with brown for their black and without their
# yellow, which is too light for lines. Methods that share a color differ in marker and line.
_COLORS = ("#d55e00", "#0072b2", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#7a4b1e")


class Style(NamedTuple):
    """A method's color, marker and line; markers of the rivals are open."""

    color: str
    marker: str
    line: str
    is_open: bool = False

    def marks(self, size: float) -> dict[str, Any]:
        """The keyword arguments of `plot` for markers without a line."""
        face = "white" if self.is_open else self.color
        return {
            "color": self.color,
            "marker": self.marker,
            "markersize": size,
            "markerfacecolor": face,
            "markeredgewidth": 1.0,
            "linestyle": "none",
        }


def _styles() -> dict[str, Style]:
    core = [name for name in CORE if name not in (REFERENCE, FULL)]
    kinds = (
        (core, "s^DvPXp", "-", False),
        (RIVALS, "s^DvPXp", "--", True),
        (ABLATIONS, "<>hd8", ":", False),
    )
    found = {REFERENCE: Style("#444444", "o", "-"), FULL: Style("#999999", "*", "--")}
    for names, markers, line, is_open in kinds:
        for name, color, marker in zip(names, _COLORS, markers, strict=False):
            found[name] = Style(color, marker, line, is_open)
    return found


STYLES = _styles()


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: Path, title: str) -> None:
    """Write a PNG without a date or a version in it, and close the figure."""
    width = min(_LINE, int(_LETTERS * figure.get_figwidth()))
    figure.suptitle(textwrap.fill(title, width), fontsize=TEXT + 3)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot().close(figure)


def finish(axis: Any, title: str, xlabel: str, ylabel: str) -> None:
    axis.set_title(title, fontsize=TEXT + 1, loc="left")
    axis.set_xlabel(xlabel, fontsize=TEXT)
    axis.set_ylabel(ylabel, fontsize=TEXT)
    axis.tick_params(labelsize=TEXT)
    for one in (axis.xaxis, axis.yaxis):
        one.set_minor_formatter("")
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def handles(methods: Collection[str]) -> list[Any]:
    """Entries of a legend, in the order of the study."""
    from matplotlib.lines import Line2D

    found = []
    for name in (name for name in METHODS if name in methods):
        style = STYLES[name]
        marks = style.marks(6) | {"linestyle": style.line, "linewidth": 1.2}
        found.append(Line2D([], [], label=METHODS[name].title, **marks))
    return found


def spread_out(entries: Sequence[Any], rows: Sequence[str]) -> dict[str, Sequence[Any]]:
    """One legend for a whole figure, divided among its rows."""
    size = math.ceil(len(entries) / len(rows))
    return {row: entries[size * i : size * (i + 1)] for i, row in enumerate(rows)}


def panels(
    rows: Mapping[str, Sequence[Any]],
    columns: Sequence[str],
    paint: Callable[[Any, str, str], bool],
) -> Any:
    """A figure with a panel for each row and column; each row has its legend at the right.

    `rows` has the entries of each row's legend. `paint(axis, row, column)` draws a panel and
    returns whether there was anything to draw; the place of an empty panel is left blank.
    """
    figure, axes = pyplot().subplots(
        len(rows),
        len(columns) + 1,
        figsize=(WIDTH * len(columns) + LEGEND, HEIGHT * len(rows) + 0.6),
        squeeze=False,
        layout="constrained",
        width_ratios=[WIDTH] * len(columns) + [LEGEND],
    )
    for line, (row, entries) in zip(axes, rows.items(), strict=True):
        for axis, column in zip(line, columns, strict=False):
            axis.set_visible(paint(axis, row, column))
        line[-1].axis("off")
        if entries:
            line[-1].legend(
                handles=list(entries), loc="upper left", fontsize=TEXT, frameon=False, borderpad=0
            )
    return figure
