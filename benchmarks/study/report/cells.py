"""The finished runs, cell by cell, and the best rate of each cell."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.study.methods import ABLATIONS, CORE, METHODS, RANK, REFERENCE, RIVALS
from benchmarks.study.plan import (
    CONFIRMATION,
    FRESH_SEEDS,
    PARTS,
    REFINEMENT,
    SEEDS,
    Cell,
    best_rate,
    finalists,
    first_rates,
    mean_losses,
    next_rate,
    rate,
    rate_index,
)
from benchmarks.study.report.statistics import Point
from benchmarks.study.store import Row, RunKey, read_curves, read_runs
from lora_kernels._utils.errors import unknown_name

AGAIN = (REFINEMENT, CONFIRMATION)  # parts whose cells are also in other parts
PLANNED = [cell for part, cells in PARTS.items() if part not in AGAIN for cell in cells]
TASKS = list(dict.fromkeys(cell.task for cell in PLANNED))
GROUPS = {"core": CORE, "rivals": RIVALS, "ablations": ABLATIONS}

Run = tuple[int, float]  # the seed, and the k of the rate


@dataclass(frozen=True, eq=False)
class Measured:
    """The runs of a cell, and the held-out curve of each run: its (step, loss) points."""

    cell: Cell
    runs: Mapping[Run, Row]
    curves: Mapping[Run, Sequence[Point]]

    def losses(self, seed: int) -> dict[float, float]:
        """The final loss of each k that has run, infinite if the run diverged."""
        return {k: self._loss(row) for (s, k), row in sorted(self.runs.items()) if s == seed}

    @property
    def first(self) -> dict[float, float]:
        """The losses of the first seed, which ran the whole grid."""
        return self.losses(SEEDS[0])

    @cached_property
    def finished(self) -> bool:
        """Whether the grid ended by the rule of the design, and all seeds of its finalists have
        run.
        """
        rows = [row for (seed, _), row in self.runs.items() if seed == SEEDS[0]]
        if not rows or next_rate(self.first, first_rates(float(rows[0]["step_size"]))) is not None:
            return False
        return all((seed, k) in self.runs for k in finalists(self.first) for seed in SEEDS)

    @cached_property
    def means(self) -> dict[float, float]:
        """The mean final loss of each k at which all seeds have finished without diverging."""
        return mean_losses([self.losses(seed) for seed in SEEDS])

    @cached_property
    def best(self) -> float | None:
        """The k of the smallest mean loss. None if the cell is unfinished, or if at least one seed
        diverged at each finalist.
        """
        if not self.finished or not self.means:
            return None
        return best_rate(self.means)

    @property
    def best_rate(self) -> float:
        """The learning rate of `best`, with three digits as in the files.

        Raises:
            ValueError: the cell has no best rate.

        """
        return rate(self._best())

    @property
    def at_grid_end(self) -> bool:
        """Whether the best rate is the lowest or the highest that has run."""
        return self.best in (min(self.first), max(self.first))

    def at_best(self, column: str) -> list[float]:
        """A column's values at the best rate, seed by seed.

        Raises:
            ValueError: the cell has no best rate.

        """
        best = self._best()
        return [number(self.runs[seed, best][column]) for seed in SEEDS]

    def fresh(self, column: str) -> list[float]:
        """A column's values at the best rate with the fresh seeds, which were not used to choose a
        rate. Empty until all of them have run, or if one of them diverged.

        Raises:
            ValueError: the cell has no best rate.

        """
        best = self._best()
        rows = [self.runs.get((seed, best)) for seed in FRESH_SEEDS]
        if any(row is None or row["status"] != "done" for row in rows):
            return []
        return [number(row[column]) for row in rows]

    @property
    def fresh_diverged(self) -> int:
        """How many of the runs at the best rate with the fresh seeds diverged."""
        rows = [self.runs.get((seed, self._best())) for seed in FRESH_SEEDS]
        return sum(row is not None and row["status"] != "done" for row in rows)

    def mean_at_best(self, column: str) -> float:
        return float(np.mean(self.at_best(column)))

    def mean_curve(self) -> list[Point]:
        """The held-out loss over the steps at the best rate, the mean of the seeds.

        Empty if a seed's curve is missing or the cell has no best rate.
        """
        if self.best is None or any((seed, self.best) not in self.curves for seed in SEEDS):
            return []
        curves = [self.curves[seed, self.best] for seed in SEEDS]
        return [
            (points[0][0], math.fsum(loss for _, loss in points) / len(points))
            for points in zip(*curves, strict=True)
        ]

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(row["status"] != "done" for row in self.runs.values())

    def _best(self) -> float:
        if self.best is None:
            raise ValueError(f"{self.cell.title} has no best rate: look at `best` before")
        return self.best

    @staticmethod
    def _loss(row: Row) -> float:
        return float(row["loss"]) if row["status"] == "done" else math.inf


class Study:
    """The cells with at least one run: task by task, r = 16 first, methods in the order of the
    study.
    """

    def __init__(self, runs: Sequence[Row], curves: Sequence[Row] = ()) -> None:
        """Sort the rows of runs.csv and curves.csv.

        Raises:
            ValueError: a row names a method that the study does not have.

        """
        rows: dict[Cell, dict[Run, Row]] = defaultdict(dict)
        points: dict[Cell, dict[Run, list[Point]]] = defaultdict(lambda: defaultdict(list))
        for row in runs:
            cell, run = _place(row)
            rows[cell][run] = row
        for row in curves:
            cell, run = _place(row)
            points[cell][run].append((float(row["step"]), number(row["loss"])))
        self.cells = [Measured(cell, rows[cell], points[cell]) for cell in sorted(rows, key=_order)]
        self._by_cell = {measured.cell: measured for measured in self.cells}

    @property
    def tuned(self) -> list[Measured]:
        """The finished cells that have a best rate."""
        return [measured for measured in self.cells if measured.best is not None]

    @property
    def unfinished(self) -> list[Measured]:
        return [measured for measured in self.cells if not measured.finished]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(measured.cell.task for measured in self.cells))

    def get(self, task: str, method: str, r: int = RANK) -> Measured | None:
        """The cell if it is finished and has a best rate."""
        measured = self._by_cell.get(Cell(task, method, r))
        return measured if measured is not None and measured.best is not None else None

    def reference(self, cell: Cell) -> Measured | None:
        """LoRA (B = 0) on the same task at the same rank, if it is finished."""
        return self.get(cell.task, REFERENCE, cell.r)


def read_study(folder: Path) -> Study:
    """All rows in a folder, of all shards; a process may be adding to them."""
    return Study(read_runs(folder), read_curves(folder))


def number(text: str) -> float:
    """A number in a file; an empty field is NaN."""
    return float(text) if text else math.nan


def _order(cell: Cell) -> tuple[int, str, bool, int, int]:
    task = TASKS.index(cell.task) if cell.task in TASKS else len(TASKS)
    return task, cell.task, cell.r != RANK, cell.r, list(METHODS).index(cell.method)


def _place(row: Row) -> tuple[Cell, Run]:
    key = RunKey.of(row)
    if key.method not in METHODS:
        raise unknown_name("method", key.method, list(METHODS))
    return Cell(key.task, key.method, key.r), (key.seed, rate_index(float(key.lr)))
