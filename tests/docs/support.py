"""The tables of docs/support.md, from docs/support.csv: `python -m tests.docs.support` fills them.

A row of the file is one cell of a table, with the ids of the tests that prove it.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ..support import ROOT

PAGE = ROOT / "docs/support.md"
CELLS = ROOT / "docs/support.csv"
PROVED = ("yes", "refused", "left out")  # answers that need a test
OPEN = ("not tested", "–")
PROOFS = "tests"  # the name of the list of tests on the page


@dataclass(frozen=True)
class Cell:
    """`note` limits the answer; `tests` are ids, as `path::Class::function`."""

    table: str
    row: str
    column: str
    answer: str
    note: str
    tests: tuple[str, ...]


def cells() -> list[Cell]:
    with CELLS.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [Cell(**{**row, "tests": tuple(row["tests"].split())}) for row in rows]


def numbers(found: Iterable[Cell]) -> dict[str, int]:
    """{id of a test: its number on the page}, in the order of the files."""
    names = dict.fromkeys(test for cell in found for test in cell.tests)
    ordered = sorted(names, key=lambda test: test.partition("::")[0])
    return {test: number for number, test in enumerate(ordered, 1)}


def text_of(cell: Cell, number: dict[str, int]) -> str:
    text = f"{cell.answer}: {cell.note}" if cell.note else cell.answer
    marks = ", ".join(str(number[test]) for test in cell.tests)
    return f"{text} [{marks}](#tests)" if marks else text


def table_of(found: list[Cell], number: dict[str, int]) -> str:
    columns = list(dict.fromkeys(cell.column for cell in found))
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for cell in found:
        rows[cell.row][cell.column] = text_of(cell, number)
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[row, *(texts[column] for column in columns)] for row, texts in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def list_of(number: dict[str, int]) -> str:
    """The tests by file."""
    files: dict[str, list[str]] = defaultdict(list)
    for test, own in number.items():
        path, _, name = test.partition("::")
        files[path].append(f"{own} `{name}`")
    return "".join(f"- [{path}](../{path}): {', '.join(own)}\n" for path, own in files.items())


def filled(page: str) -> str:
    """The page with its tables, and the list of tests, between their markers."""
    found = cells()
    number = numbers(found)
    texts = {PROOFS: list_of(number)}
    for name in dict.fromkeys(cell.table for cell in found):
        texts[name] = table_of([cell for cell in found if cell.table == name], number)
    for name, text in texts.items():
        marked = re.compile(
            rf"(<!-- support {name} -->\n).*?(<!-- end of support {name} -->)", re.DOTALL
        )
        page, count = marked.subn(lambda match, text=text: match[1] + text + match[2], page)
        if count != 1:
            raise ValueError(f"{PAGE.name} has {count} places for the table {name!r}")
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
