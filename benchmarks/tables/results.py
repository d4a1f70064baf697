"""The CSV files of benchmarks/results/, and what they say about the machine that was measured."""

from __future__ import annotations

import csv
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
WIDTH = 110  # of a line of Markdown

Row = Mapping[str, str]


@dataclass(frozen=True)
class Results:
    """A folder of CSV files; `file` is always a path inside it."""

    folder: Path = RESULTS

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def rows(self, file: str) -> list[Row]:
        with (self.folder / file).open(newline="", encoding="utf-8") as opened:
            return list(csv.DictReader(opened))

    def matching(self, pattern: str) -> list[str]:
        """The files that match, sorted."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(pattern))

    def caption(self, files: Sequence[str], note: str = "") -> str:
        """The note, then the machine and the versions, as the files' own columns name them, and the
        files.
        """
        rows = [row for file in files for row in self.rows(file)]
        return wrapped(f"{note} {'; '.join([*machine(rows), paths(files)])}.")


def paths(files: Iterable[str]) -> str:
    """The files as paths in the repository."""
    made = [f"`benchmarks/results/{file}`" for file in files]
    return " and ".join([", ".join(made[:-1]), made[-1]] if made[1:] else made)


def wrapped(text: str) -> str:
    """Text in lines of at most `WIDTH` characters."""
    return textwrap.fill(text.strip(), WIDTH, break_long_words=False, break_on_hyphens=False)


def machine(rows: Sequence[Row]) -> list[str]:
    """The device, its instruction sets and the versions; a column that no file has is left out."""

    def of(column: str) -> str:
        return " / ".join(dict.fromkeys(row[column] for row in rows if row.get(column)))

    device, cpu, threads = of("device"), of("cpu"), of("threads")
    kernels, processor = of("kernels"), of("processor")
    if device:
        device += f" with {cpu}" if cpu else ""
        device += f", {threads} {'thread' if threads == '1' else 'threads'}" if threads else ""
    if processor and processor != kernels:
        device += f", a processor that has {processor}"
    torch = of("torch") and f"torch {of('torch')}"
    torch += f" ({of('torch_kernels')})" if of("torch_kernels") else ""
    versions = {name: of(name.lower()) for name in ("CUDA", "Triton", "PEFT", "Python")}
    found = [device, kernels and f"kernels {kernels}", torch]
    if plan := of("plan"):
        found.append(f"plan {plan}")
    return [
        *(text for text in found if text),
        *(f"{name} {version}" for name, version in versions.items() if version),
    ]


def matching(rows: Iterable[Row], **facts: object) -> list[Row]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row[key] == str(value) for key, value in facts.items())]


def value(rows: Iterable[Row], column: str, **facts: object) -> float | None:
    """A number of the first row that matches; None if there is no such row or no number in it."""
    found = matching(rows, **facts)
    return float_of(found[0].get(column)) if found else None


def float_of(text: str | None) -> float | None:
    """A number; None for an empty cell, text and NaN."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(number) else number


def cases(rows: Iterable[Row], *columns: str) -> list[tuple[str, ...]]:
    """The combinations of these columns, in the order of the file."""
    return list(dict.fromkeys(tuple(row[column] for column in columns) for row in rows))
