"""The runs of a shard, one after another, in one process."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.common.harness import environment
from benchmarks.study.plan import (
    CONFIRMATION,
    FRESH_SEEDS,
    REFINEMENT,
    SEEDS,
    Cell,
    best_rate,
    between,
    finalists,
    first_rates,
    mean_losses,
    next_rate,
    rate,
    rate_index,
)
from benchmarks.study.store import Row, RunKey, Store, rate_name
from benchmarks.study.tasks import TASKS, Task
from benchmarks.study.training import Outcome, Started


class OutOfTimeError(Exception):
    """The time given to the process is over."""


@dataclass(frozen=True)
class Finished:
    """A run that has just been written, for the progress display."""

    key: RunKey
    row: dict[str, str]


class Runner:
    """Makes the runs that the store does not have yet.

    For each cell and seed, one model is in memory. Its start is computed once, and each rate trains
    from a copy of its initial values.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        report: Callable[[Finished], None],
        deadline: float = math.inf,
    ) -> None:
        self._store, self._device, self._report, self._deadline = store, device, report, deadline
        self._task: Task | None = None
        self._started: tuple[Cell, int, Started] | None = None
        self._environment = environment(device)

    def run(self, work: Sequence[tuple[str, Cell]]) -> None:
        """Make all runs of these (part, cell) pairs.

        Raises:
            OutOfTimeError: the deadline, in seconds of `time.monotonic`, has passed.

        """
        for part, cell in work:
            if part == REFINEMENT:
                self._again(cell, between, SEEDS)
            elif part == CONFIRMATION:
                self._again(cell, lambda means: [best_rate(means)], FRESH_SEEDS)
            else:
                self._tune(cell)

    def repeat(self, cell: Cell, seed: int, rates: Sequence[float]) -> None:
        """Repeat the runs of one seed at these rates, given as k."""
        for k in rates:
            self._train(cell, seed, k)

    def _tune(self, cell: Cell) -> None:
        first = self._first_rates(cell)
        losses = losses_of(self._store.finished, cell, SEEDS[0])
        while (k := next_rate(losses, first)) is not None:
            self._train(cell, SEEDS[0], k)
            losses = losses_of(self._store.finished, cell, SEEDS[0])
        for seed in SEEDS[1:]:
            done = losses_of(self._store.finished, cell, seed)
            for k in finalists(losses):
                if k not in done:
                    self._train(cell, seed, k)

    def _again(
        self,
        cell: Cell,
        rates: Callable[[Mapping[float, float]], list[float]],
        seeds: Sequence[int],
    ) -> None:
        """Make further runs of a tuned cell, at the rates that follow from its mean losses. Does
        nothing if the cell is not tuned in this folder.
        """
        self._store.refresh()  # another shard may have tuned it
        finished = self._store.finished
        means = mean_losses([losses_of(finished, cell, seed) for seed in SEEDS])
        for seed in seeds if means else ():
            for k in rates(means):
                if k not in losses_of(finished, cell, seed):
                    self._train(cell, seed, k)

    def _first_rates(self, cell: Cell) -> list[int]:
        """The first grid, from κ, which is in every finished run of the cell's first seed."""
        for key, row in self._store.finished.items():
            if key[:4] == (cell.task, cell.method, cell.r, SEEDS[0]):
                return first_rates(float(row["step_size"]))
        return first_rates(self._start(cell, SEEDS[0]).step_size)

    def _train(self, cell: Cell, seed: int, k: float) -> None:
        if time.monotonic() > self._deadline:
            raise OutOfTimeError
        started = self._start(cell, seed)
        key = RunKey(cell.task, cell.method, cell.r, seed, rate_name(rate(k)))
        outcome = started.run(rate(k))
        row = self._row(key, started, outcome)
        self._store.add(row, _points(key, outcome))
        self._report(Finished(key, row))

    def _start(self, cell: Cell, seed: int) -> Started:
        if self._started is None or self._started[:2] != (cell, seed):
            self._started = None
            gc.collect()  # models contain reference cycles
            task = self._load(cell.task)
            self._started = (cell, seed, Started(task, cell.method, cell.r, seed))
        return self._started[2]

    def _load(self, name: str) -> Task:
        if self._task is None or self._task.name != name:
            self._task = None
            self._task = TASKS[name](self._device)
        return self._task

    def _row(self, key: RunKey, started: Started, outcome: Outcome) -> dict[str, str]:
        first, last = outcome.points[0], outcome.points[-1]
        known = {name: self._environment.get(name, "") for name in _ENVIRONMENT}
        return {
            **_key(key),
            "status": "diverged" if outcome.diverged else "done",
            "steps": str(started.task.steps),
            "start_loss": _digits(first.loss),
            "loss": _digits(last.loss),
            "best_loss": _digits(min(point.loss for point in outcome.points)),
            "start_metric": _digits(first.metric),
            "metric": _digits(last.metric),
            "nu_weight": _digits(started.nu_weight),
            "nu_update": _digits(last.nu_update),
            "scaling": _digits(started.scaling),
            "step_size": _digits(started.step_size),
            "start_seconds": f"{started.seconds:.3g}",
            "start_mib": f"{started.mib:.0f}",
            "seconds": f"{outcome.seconds:.3g}",
            **known,
        }


def losses_of(finished: Mapping[RunKey, Row], cell: Cell, seed: int) -> dict[float, float]:
    """The final loss at each k that has run; infinite if the run diverged."""
    found = {}
    for key, row in finished.items():
        if key[:4] == (cell.task, cell.method, cell.r, seed):
            loss = float(row["loss"]) if row["status"] == "done" else math.inf
            found[rate_index(float(key.lr))] = loss
    return found


_ENVIRONMENT = ("device", "kernels", "torch_kernels", "processor", "threads", "python", "torch")


def _points(key: RunKey, outcome: Outcome) -> list[dict[str, str]]:
    return [
        {
            **_key(key),
            "step": str(point.step),
            "train_loss": _digits(point.train_loss),
            "loss": _digits(point.loss),
            "metric": _digits(point.metric),
            "nu_update": _digits(point.nu_update),
        }
        for point in outcome.points
    ]


def _key(key: RunKey) -> dict[str, str]:
    return {name: str(value) for name, value in key._asdict().items()}


def _digits(value: float) -> str:
    """Nine digits, which tell any two float32 numbers apart; empty for NaN."""
    return "" if math.isnan(value) else f"{value:.9g}"
