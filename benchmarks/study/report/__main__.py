"""Make the tables and figures of all finished runs, and put the tables into a document."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.common.document import put_tables
from benchmarks.common.report import RESULTS
from benchmarks.study.report import write_report
from benchmarks.study.report.cells import read_study
from benchmarks.study.report.tables import tables


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 1 if the document has a marker without a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.study.report", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder of the results")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FILE",
        help="Markdown file, such as docs/study.md, with lines <!-- table NAME --> and "
        "<!-- end of table NAME -->",
    )
    options, console = parser.parse_args(argv), Console()
    write_report(options.out, console)
    if options.into is None:
        return 0
    try:
        names = put_tables(options.into, tables(read_study(options.out)))
    except ValueError as error:
        console.print(str(error), style="red", highlight=False)
        return 1
    console.print(f"Put into {options.into}: {', '.join(names) or 'no table, it has no markers'}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
