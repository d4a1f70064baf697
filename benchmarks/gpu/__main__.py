"""Every GPU target, in parts: `python -m benchmarks.gpu [PART ...]`.

Each part writes a CSV and a PNG to benchmarks/results/<gpu>/ and prints a table; headline.csv has
every target with its aim, its prediction and what was measured. Of several parts each runs in a
process of its own, so that an error which breaks one's CUDA context leaves the others alone.
`--predict` needs no GPU.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common.report import RESULTS
from benchmarks.gpu.headline import write_headline, write_prediction
from benchmarks.gpu.parts import ceilings, decode, grid, init, layer, memory, operators, svd
from benchmarks.gpu.session import Session, slug
from benchmarks.gpu.targets.plan import FULL, QUICK, Plan

# The targets first, then what may be cut short.
PARTS = {
    "ceilings": ceilings.run,
    "init": init.run,
    "operators": operators.run,
    "layer": layer.run,
    "decode": decode.run,
    "memory": memory.run,
    "svd": svd.run,
    "grid": grid.run,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, a corner of the grid")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="what is not begun by then is skipped (7)"
    )
    parser.add_argument("--out", type=Path, help="the folder to write to")
    parser.add_argument(
        "--predict",
        action="store_true",
        help="only predict the figures of an H200 and an H100; needs no GPU",
    )
    options = parser.parse_args(argv)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return options


def run_parts(session: Session, parts: Sequence[str]) -> bool:
    """True if none broke; one that breaks does not stop the others."""
    good = True
    for part in parts:
        try:
            gc.collect()  # it finds the device empty
            if session.device.type == "cuda":
                torch.cuda.empty_cache()
            PARTS[part](session)
        except Exception:
            good = False
            session.console.print(f"{part} broke:", style="red")
            session.console.print_exception(max_frames=6)
    return good


def run_apart(parts: Sequence[str], options: argparse.Namespace) -> int:
    """Each part in a process of its own, one after the other; 1 if one failed."""
    end = time.monotonic() + 60 * options.minutes
    status = 0
    for part in parts:
        minutes = max(0.0, (end - time.monotonic()) / 60)
        command = [sys.executable, "-m", "benchmarks.gpu", part, "--minutes", f"{minutes:.3f}"]
        command += ["--quick"] if options.quick else []
        command += ["--out", str(options.out)] if options.out else []
        status |= subprocess.run(command).returncode != 0
    return int(status)


def main(
    argv: Sequence[str] | None = None,
    *,
    device: torch.device | None = None,
    plan: Plan | None = None,
) -> int:
    """0, or 1 if a part broke, 2 without a GPU. `device` and `plan` are for the tests."""
    options = parse(argv)
    parts = [part for part in PARTS if part in (options.parts or PARTS)]
    # A log file has no width of its own; the tables want more than the default of 80.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    plan = plan or (QUICK if options.quick else FULL)
    if options.predict:
        write_prediction(console, options.out or RESULTS, plan)
        return 0
    if device is None:
        if not torch.cuda.is_available():
            print("benchmarks.gpu: no CUDA GPU here; --predict works without one", file=sys.stderr)
            return 2
        if len(parts) > 1:
            return run_apart(parts, options)
        device = torch.device("cuda", torch.cuda.current_device())
    warnings.filterwarnings("ignore", module="peft")
    out = options.out
    if out is None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        out = RESULTS / slug(name) / ("quick" if options.quick else "")
    torch.manual_seed(0)
    session = Session(device, plan, out, options.minutes, console)
    console.print(", ".join(f"{key} {value}" for key, value in session.environment.items()))
    good = run_parts(session, parts)
    if not session.measured:
        return 0 if good else 1
    write_headline(session)
    if session.over:
        console.print(
            f"The budget of {options.minutes:g} minutes was spent: what is marked 'skipped' was "
            "not measured. Run its part alone, or raise --minutes.",
            style="yellow",
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
