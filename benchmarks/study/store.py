"""The results: two CSV files, a row for each finished run and a row for each point of its curve."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Row = Mapping[str, str]


class RunKey(NamedTuple):
    """The identity of a run: the same key gives the same numbers on one instruction set."""

    task: str
    method: str
    r: int
    seed: int
    lr: str  # three significant digits, as `rate_name` writes them

    @staticmethod
    def of(row: Row) -> RunKey:
        return RunKey(row["task"], row["method"], int(row["r"]), int(row["seed"]), row["lr"])


KEY = RunKey._fields
RUN_COLUMNS = (
    *KEY,
    *("status", "steps", "start_loss", "loss", "best_loss", "start_metric", "metric"),
    *("nu_weight", "nu_update", "scaling", "step_size"),
    *("start_seconds", "start_mib", "seconds"),
    *("device", "kernels", "torch_kernels", "processor", "threads", "python", "torch"),
)
CURVE_COLUMNS = (*KEY, "step", "train_loss", "loss", "metric", "nu_update")


def rate_name(lr: float) -> str:
    """0.000316 -> "3.16e-04"."""
    return f"{lr:.2e}"


@dataclass(frozen=True)
class Shard:
    """Part i of n of the cells, from 1."""

    index: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str) -> Shard:
        """Read "2/4" as Shard(2, 4).

        Raises:
            ValueError: the text is not i/n with 1 <= i <= n.

        """
        index, _, count = text.partition("/")
        if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
            raise ValueError(f"a shard is i/n with 1 <= i <= n, such as 1/2; got {text!r}")
        return Shard(int(index), int(count))

    @property
    def suffix(self) -> str:
        """The suffix of this shard's files: "" or "-2-of-4"."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"


class Store:
    """Appends to this shard's files, and reads the finished runs of all shards in the folder.

    A process may be killed at any time: a run is finished once its row is in the file of runs, and
    points of unfinished runs are dropped when the files are opened again.
    """

    def __init__(self, folder: Path, shard: Shard = Shard()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._runs = folder / f"runs{shard.suffix}.csv"
        self._curves = folder / f"curves{shard.suffix}.csv"
        own = _complete_rows(self._runs, RUN_COLUMNS)
        keys = {RunKey.of(row) for row in own}
        points = _complete_rows(self._curves, CURVE_COLUMNS)
        write_rows(self._runs, RUN_COLUMNS, own)
        write_rows(self._curves, CURVE_COLUMNS, [p for p in points if RunKey.of(p) in keys])
        self.finished = Store.read(folder)

    @staticmethod
    def read(folder: Path) -> dict[RunKey, Row]:
        """The finished runs in a folder, of all shards."""
        return {RunKey.of(row): row for row in read_runs(folder)}

    def refresh(self) -> None:
        """Read the runs that other shards have finished since the last read."""
        self.finished.update(Store.read(self.folder))

    def add(self, run: Row, points: Sequence[Row]) -> None:
        """Write one finished run: its points first."""
        _append(self._curves, CURVE_COLUMNS, points)
        _append(self._runs, RUN_COLUMNS, [run])
        self.finished[RunKey.of(run)] = run


def read_runs(folder: Path) -> list[Row]:
    """The rows of all shards, each run once, in the order of their keys."""
    return _merged(folder, "runs*.csv", RUN_COLUMNS)


def read_curves(folder: Path) -> list[Row]:
    """The points of all shards' finished runs, in the order of their keys and steps."""
    keys = {RunKey.of(row) for row in read_runs(folder)}
    rows = _merged(folder, "curves*.csv", CURVE_COLUMNS)
    return [row for row in rows if RunKey.of(row) in keys]


def merge(folder: Path) -> None:
    """Put the rows of all shards into runs.csv and curves.csv, and remove the shards' files.

    No process may be writing to the folder.
    """
    runs, curves = read_runs(folder), read_curves(folder)
    write_rows(folder / "runs.csv", RUN_COLUMNS, runs)
    write_rows(folder / "curves.csv", CURVE_COLUMNS, curves)
    for path in [*folder.glob("runs-*-of-*.csv"), *folder.glob("curves-*-of-*.csv")]:
        path.unlink()


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Replace the whole file."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def _append(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, columns, lineterminator="\n").writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def _merged(folder: Path, pattern: str, columns: Sequence[str]) -> list[Row]:
    found = {}
    for path in sorted(folder.glob(pattern)):
        for row in _complete_rows(path, columns):
            found[RunKey.of(row), int(row.get("step", 0))] = row
    return [found[key] for key in sorted(found, key=lambda k: (*k[0][:4], float(k[0].lr), k[1]))]


def _complete_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a file; a last line that a killed process left unfinished is dropped.

    Raises:
        ValueError: the file has different columns.

    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    reader = csv.DictReader(whole)
    if tuple(reader.fieldnames or columns) != tuple(columns):
        raise ValueError(f"{path.name} has other columns than this version of the study writes")
    return list(reader)
