"""Build, test and measure on a GPU: `python -m benchmarks.card first|again --out DIR`.

The most important parts run first. Each has a time limit, and none stops the others. DIR gets at
most eight files, which are rewritten every few seconds, so that a killed run leaves its results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.card.pack import Pack
from benchmarks.card.parts import CALLS, Call
from benchmarks.card.running import Runner
from benchmarks.card.table import report

ROOT = Path(__file__).parents[2]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.card", description=__doc__)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument("--minutes", type=float, help="limit for the whole call (first 9, again 5)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="run only these parts")
    parser.add_argument("--tests", type=Path, help="again: a file with one test id per line")
    parser.add_argument(
        "--python", default=sys.executable, help="a Python with a CUDA build of torch"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results", help="folder of the results"
    )
    options = parser.parse_args(argv)
    names = CALLS[options.call].names
    for name in options.only or ():
        if name not in names:
            parser.error(f"there is no part {name!r} in '{options.call}': {', '.join(names)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Return 0 if every part that could run passed, else 1."""
    options = parse(argv)
    # After a SIGTERM, for instance from `timeout`, stop the parts and print the table.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(128 + signal.SIGTERM))
    work = Path(tempfile.mkdtemp(prefix="card-"))
    call = Call(
        python=options.python,
        work=work,
        results=options.results.resolve(),
        tests=tuple(_ids(options.tests)),
        cpus=os.cpu_count() or 1,
    )
    definition = CALLS[options.call]
    minutes = options.minutes or definition.minutes
    pack = Pack(options.out, work, call.results)
    runner = Runner(call, pack, ROOT, minutes, definition.minutes)
    status = 1
    try:
        for stage in definition.stages:
            # All parts need the facts: where results go, whether tests can run in parallel.
            only = {*options.only, "facts"} if options.only else definition.names
            wanted = [part for part in stage if part.name in only]
            runner.run_stage(wanted)
        status = int(runner.failed)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        runner.stop()
        text = report(runner.outcomes, call.headline(), runner.failing_tests(), runner.started)
        try:
            pack.write(text, runner.outcomes, runner.failing_tests())
        finally:
            shutil.rmtree(work, ignore_errors=True)
            print(text, flush=True)
    return status


def _ids(path: Path | None) -> list[str]:
    if path is None:
        return []
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


if __name__ == "__main__":
    sys.exit(main())
