"""docs/support.md: each cell is what docs/support.csv says, and each test that it names exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from ..support import ROOT
from .support import OPEN, PAGE, PROVED, cells, filled

CELLS = cells()
TABLES = list(dict.fromkeys(cell.table for cell in CELLS))


@functools.cache
def functions(path: Path) -> set[str]:
    """The tests of a file, as `Class::function`; the file is not imported."""

    def within(body: list[ast.stmt], prefix: str) -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.ClassDef):
                found |= within(node.body, f"{prefix}{node.name}::")
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                found.add(prefix + node.name)
        return found

    return within(ast.parse(path.read_text(encoding="utf-8")).body, "")


@pytest.mark.parametrize("table", TABLES)
def test_every_named_test_exists(table):
    for cell in CELLS:
        if cell.table != table:
            continue
        for test in cell.tests:
            path, _, name = test.partition("::")
            place = f"{cell.row} / {cell.column}: {test}"
            assert path.startswith("tests/") and (ROOT / path).is_file(), place
            assert name in functions(ROOT / path), place


def test_an_answer_has_a_test_or_says_that_it_has_none():
    for cell in CELLS:
        place = f"{cell.table}: {cell.row} / {cell.column}"
        assert cell.answer in PROVED + OPEN, place
        assert bool(cell.tests) == (cell.answer in PROVED), place
        assert not cell.note or cell.tests, place


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_full(table):
    found = [(cell.row, cell.column) for cell in CELLS if cell.table == table]
    rows, columns = ({own[k] for own in found} for k in (0, 1))
    assert len(found) == len(set(found)) == len(rows) * len(columns)


def test_the_page_has_these_tables():
    page = PAGE.read_text(encoding="utf-8")
    assert page == filled(page), "write them with `python -m tests.docs.support`"


def test_the_lowest_versions_are_those_of_the_package():
    """The page's "or later" beside `pyproject.toml`'s ">="."""
    page, project = (p.read_text(encoding="utf-8") for p in (PAGE, ROOT / "pyproject.toml"))
    lowest = dict(re.findall(r'"?([\w-]+)(?: = ")?>=([\d.]+)', project))
    lowest["python"] = lowest.pop("requires-python")
    said = re.findall(r"^\| (\S+) \| ([\d.]+) or later \|", page, re.MULTILINE)
    assert len(said) >= 5
    for name, version in said:
        assert lowest[name.lower()] == version, name
