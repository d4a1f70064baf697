"""`python -m benchmarks.survey`: survey all architectures, and write a CSV file and a page of
docs/.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .checks import CHECKS, Row, quiet, timed_survey
from .table import write_table

_COLUMNS = ["class", "family", "built", "parameters", "layers", "inputs", "effect", *CHECKS]
_COLUMNS += ["skipped", "seconds"]


def main() -> None:
    options = _options()
    quiet()
    from .families import family_classes

    classes = sorted(family_classes().items(), key=lambda item: (item[1], item[0]))
    chosen = [c for c in classes if re.search(options.only, f"{c[0]} {c[1]}")][: options.limit]
    rows = []
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with (
        options.out.open("w", newline="") as file,
        ProcessPoolExecutor(options.jobs, context, quiet) as pool,
    ):
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for number, (row, seconds) in enumerate(pool.map(timed_survey, chosen), 1):
            rows.append(row)
            writer.writerow(_record(row, seconds))
            file.flush()
            _tell(row, number, len(chosen), time.perf_counter() - began)
    if options.table:
        write_table(rows, options.table)
    print(_summary(rows, time.perf_counter() - began))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.survey", description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N classes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes")
    parser.add_argument("--out", type=Path, default=Path("build/survey.csv"), metavar="FILE.csv")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="such as docs/families.md")
    return parser.parse_args()


def _record(row: Row, seconds: float) -> dict[str, object]:
    record: dict[str, object] = {"class": row.name, "family": row.family, "built": row.built}
    record |= {"parameters": row.parameters, "layers": row.layers, "inputs": row.inputs}
    record |= {"effect": f"{row.effect:.1e}", "skipped": row.skipped, "seconds": f"{seconds:.2f}"}
    return record | {check: row.checks.get(check, "-") for check in CHECKS}


def _tell(row: Row, number: int, total: int, seconds: float) -> None:
    failed = [f"{check}: {text[:150]}" for check, text in row.checks.items() if "FAIL" in text[:4]]
    state = "; ".join(failed) or (row.built[:100] if row.built != "ok" else "ok")
    print(f"{number}/{total} {seconds:.0f} s {row.name} {state}", file=sys.stderr, flush=True)


def _summary(rows: list[Row], seconds: float) -> str:
    built = [row for row in rows if row.built == "ok"]
    lines = [f"{len(built)} of {len(rows)} classes in {seconds:.0f} s"]
    for check in CHECKS:
        kinds = [row.checks.get(check, "-").split(" ")[0].rstrip(":") for row in built]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        lines.append(f"{check:10s} {counts}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
