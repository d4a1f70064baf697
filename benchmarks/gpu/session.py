"""State shared by the parts: the device, the plan, the time left, the ceilings, the results."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.card.names import slug
from benchmarks.common.harness import Timing, environment
from benchmarks.common.report import print_table, short, write_csv
from benchmarks.gpu.machine import measure_ceilings
from benchmarks.gpu.targets.costs import Machine
from benchmarks.gpu.targets.plan import Plan

SKIPPED = "skipped: time budget"


class Session:
    """One run. `measured` maps a target's name to (the value in the aim's unit, or the reason why
    it is missing; milliseconds).
    """

    def __init__(
        self, device: torch.device, plan: Plan, out: Path, minutes: float, console: Console
    ) -> None:
        self.device, self.plan, self.out, self.console = device, plan, out, console
        self.measured: dict[str, tuple[float | str, float | None]] = {}
        self.started = datetime.now(timezone.utc)
        self._deadline = time.monotonic() + 60 * minutes

    @property
    def seconds_left(self) -> float:
        """Time left of the budget; negative once it is spent."""
        return self._deadline - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the budget is spent, so that the remaining measurements are skipped."""
        return self.seconds_left <= 0

    @cached_property
    def environment(self) -> dict[str, str]:
        """The columns, in every CSV file, for the hardware and software versions and the plan."""
        return environment(self.device) | {"plan": self.plan.name}

    @cached_property
    def machine(self) -> Machine:
        """The ceilings, measured at first use."""
        return measure_ceilings(self.device, self.plan, slug(self.environment["device"]))

    @cached_property
    def earlier(self) -> dict[str, dict[str, str]]:
        """The rows, by target, of the headline.csv that an earlier run wrote."""
        path = self.out / "headline.csv"
        if not path.is_file():
            return {}
        with path.open(newline="", encoding="utf-8") as file:
            return {row["line"]: row for row in csv.DictReader(file)}

    def milliseconds(self, line: str) -> float | None:
        """The time of a target, measured in this run or an earlier one."""
        if line in self.measured:
            return self.measured[line][1]
        return float(self.earlier.get(line, {}).get("measured_ms") or 0) or None

    def record(self, line: str, value: float | str, milliseconds: float | None = None) -> None:
        """Store a target's measured value, or the reason why it is missing."""
        if isinstance(value, float) and math.isnan(value):
            value = "no value"
        self.measured[line] = (value, milliseconds)

    def record_timing(self, line: str, timing: Timing, value: float) -> None:
        """Store `value` for a target, or the reason why its timing failed."""
        if timing.failure:
            self.record(line, timing.failure)
        else:
            self.record(line, value, 1e3 * timing.median)

    def publish(
        self,
        name: str,
        title: str,
        rows: Sequence[Mapping[str, object]],
        shown: Mapping[str, str],
    ) -> None:
        """Write `<name>.csv` and print the columns in `shown`, {column: its heading}."""
        self.save(name, rows)
        cells = [{head: cell(row.get(key, "")) for key, head in shown.items()} for row in rows]
        print_table(self.console, title, cells)

    def save(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Write `<name>.csv`."""
        write_csv(self.out / f"{name}.csv", [{**row, **self.environment} for row in rows])


def cell(value: object) -> str:
    """The text of a table's cell: floats with three digits, NaN as an empty string."""
    return short(value) if isinstance(value, float) else str(value)
