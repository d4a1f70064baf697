"""Make all runs of the study that are still missing, then write the tables and figures.

Each finished run is a row of runs.csv and is not repeated, so a process that was killed or ran out
of time resumes where it stopped. Tables and figures are made from all rows of all shards.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common.report import RESULTS
from benchmarks.common.smollm2 import MissingWheelError
from benchmarks.study.check import check
from benchmarks.study.display import Display
from benchmarks.study.plan import PARTS, TASK_NAMES, work_of
from benchmarks.study.running import OutOfTimeError, Runner
from benchmarks.study.store import Shard, Store, merge


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.study", description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
        help=f"parts of the study: {', '.join(PARTS)} (default: all, in this order)",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", nargs="+", choices=TASK_NAMES, default=TASK_NAMES, metavar="TASK",
        help=f"tasks of these parts: {', '.join(TASK_NAMES)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--check",
        action="store_true",
        help="first repeat a part of the published runs, and compare every digit",
    )
    parser.add_argument(
        "--report", action="store_true", help="only make the tables and figures of what has run"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="first put the files of all shards into one; no shard may be running",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of a process (default 1: two shards of one thread do 1.3 times the work of "
        "one process of two)",
    )
    parser.add_argument(
        "--shard", type=Shard.parse, default=Shard(), metavar="I/N", help="part I of N of the cells"
    )
    parser.add_argument("--minutes", type=float, help="begin no run after so many minutes")
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder of the results")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0, or 1 if data are missing or `--check` finds a difference."""
    options, console = parse(argv), Console()
    torch.set_num_threads(options.threads)
    minutes = math.inf if options.minutes is None else options.minutes
    deadline = time.monotonic() + 60 * minutes
    if options.merge:
        merge(options.out)
    try:
        if options.check and not check(options.out, torch.device(options.device), console):
            return 1
        if not options.report:
            _run(options, deadline, console)
    except MissingWheelError as error:
        console.print(f"The study cannot run: {error}", style="red")
        return 1
    if options.shard.count == 1:
        from benchmarks.study.report import write_report

        write_report(options.out, console)
    return 0


def _run(options: argparse.Namespace, deadline: float, console: Console) -> None:
    work = work_of(options.parts, options.shard, options.tasks)
    store = Store(options.out, options.shard)
    with Display(console, work, store.finished) as display:
        runner = Runner(store, torch.device(options.device), display.show, deadline)
        try:
            runner.run(work)
        except OutOfTimeError:
            console.print("The time is over; the same command goes on from here.")


if __name__ == "__main__":
    sys.exit(main())
