"""The progress of a study: a line for each run, and a bar with the remaining time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks.study.methods import METHODS
from benchmarks.study.plan import (
    CONFIRMATION,
    FINALISTS,
    FRESH_SEEDS,
    PARTS,
    RATES,
    REFINEMENT,
    SEEDS,
    Cell,
    rate_index,
)
from benchmarks.study.running import Finished
from benchmarks.study.store import Row, RunKey

RUNS = {REFINEMENT: 2 * len(SEEDS), CONFIRMATION: len(FRESH_SEEDS)}
TUNING = RATES + FINALISTS * (len(SEEDS) - 1)  # runs of a cell, without extensions of the grid
FIRST_GUESS = 40.0  # seconds of a run, until one has been timed


class Display:
    """Context manager; `show` is called after each run."""

    def __init__(
        self,
        console: Console,
        work: Sequence[tuple[str, Cell]],
        finished: Mapping[RunKey, Row],
    ) -> None:
        self._console, self._work = console, work
        self._finished = finished
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[left]}"), console=console)
        self._bar = self._progress.add_task("runs", total=0, left="")

    def __enter__(self) -> Display:
        self._progress.start()
        self._update()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, run: Finished) -> None:
        """Print one line, and bring the bar up to date."""
        key, row = run.key, run.row
        result = (
            f"{row['start_loss'][:6]} → {row['loss'][:6]}, {float(row['metric']):.3f}"
            if row["status"] == "done"
            else "diverged"
        )
        self._console.print(
            f"{key.task:10} {METHODS[key.method].title:24} r={key.r:<3} lr {key.lr} "
            f"seed {key.seed}: {result} ({float(row['seconds']):.0f} s)",
            highlight=False,
        )
        self._update()

    def _update(self) -> None:
        done, left, total = 0, 0.0, 0
        for part, cell in self._work:
            own = [
                key
                for key in self._finished
                if key[:3] == (cell.task, cell.method, cell.r) and part in _parts_of(key)
            ]
            planned = max(len(own), RUNS.get(part, TUNING))
            done, total = done + len(own), total + planned
            left += (planned - len(own)) * self._seconds(cell.task)
        self._progress.update(self._bar, completed=done, total=total, left=f"{_clock(left)} left")

    def _seconds(self, task: str) -> float:
        """The mean time of the task's runs so far."""
        times = [float(row["seconds"]) for key, row in self._finished.items() if key.task == task]
        return sum(times) / len(times) if times else FIRST_GUESS


def _parts_of(key: RunKey) -> list[str]:
    """The parts that a run may belong to."""
    if key.seed in FRESH_SEEDS:
        return [CONFIRMATION]
    if rate_index(float(key.lr)) % 1:
        return [REFINEMENT]
    return [part for part in PARTS if part not in RUNS]


def _clock(seconds: float) -> str:
    """As in "about 1 h 25 min"."""
    minutes = round(seconds / 60)
    hours = f"{minutes // 60} h " if minutes >= 60 else ""
    return f"about {hours}{minutes % 60} min"
