"""Fill the tables of README.md and docs/ from benchmarks/results/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.document import names_in, replace_text, with_tables

from . import tables
from .results import RESULTS

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "docs/study.md"  # filled by benchmarks.study.report


def pages() -> list[Path]:
    """README.md and all pages of docs/ except the study."""
    return [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - {STUDY})]


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0; or 1 if a page has a marker that does not fit or, with --check, outdated tables."""
    parser = argparse.ArgumentParser("python -m benchmarks.tables", description=__doc__)
    parser.add_argument(
        "pages", type=Path, nargs="*", metavar="PAGE", help="default: README.md and docs/"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; name the pages that differ"
    )
    options = parser.parse_args(argv)
    made, texts = tables(options.results), {}
    try:
        for page in options.pages or pages():
            old = page.read_text(encoding="utf-8")
            texts[page] = old, with_tables(old, made, _name(page))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    differing = [page for page, (old, new) in texts.items() if old != new]
    for page in differing:
        names = ", ".join(names_in(texts[page][1]))
        if options.check:
            print(f"{_name(page)} differs from `python -m benchmarks.tables` (it has {names})")
        else:
            replace_text(page, texts[page][1])
            print(f"{_name(page)}: {names}")
    return 1 if options.check and differing else 0


def _name(page: Path) -> str:
    """The page's path relative to the repository, if the page is inside it."""
    path = page.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else page)


if __name__ == "__main__":
    sys.exit(main())
