"""Measure every target on a GPU, in parts: `python -m benchmarks.gpu [PART ...]`.

Each part writes a CSV and a PNG file to benchmarks/results/<gpu>/ and prints a table. headline.csv
lists every target with its aim, its prediction and its measurement. Several parts each run in their
own process, so that an error that breaks the CUDA context of one does not affect the others.
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
from benchmarks.gpu.parts import (
    ceilings,
    decode,
    experts,
    grid,
    init,
    layer,
    memory,
    operators,
    sharded,
    svd,
)
from benchmarks.gpu.session import Session, slug
from benchmarks.gpu.targets.plan import FULL, QUICK, Plan

# In order of importance: the last ones are skipped when the time is up.
PARTS = {
    "ceilings": ceilings.run,
    "init": init.run,
    "operators": operators.run,
    "layer": layer.run,
    "decode": decode.run,
    "memory": memory.run,
    "experts": experts.run,
    "sharded": sharded.run,
    "svd": svd.run,
    "grid": grid.run,
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, a small part of the grid"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=7.0,
        help="measurements not begun by then are skipped (default: 7)",
    )
    parser.add_argument("--out", type=Path, help="output folder")
    parser.add_argument(
        "--predict",
        action="store_true",
        help="only write the predictions for an H200 and an H100; needs no GPU",
    )
    options = parser.parse_args(argv)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return options


def run_parts(session: Session, parts: Sequence[str]) -> bool:
    """Run the parts; return whether all succeeded. An error in one does not stop the others."""
    good = True
    for part in parts:
        try:
            gc.collect()  # so that the part begins with an empty device
            if session.device.type == "cuda":
                torch.cuda.empty_cache()
            PARTS[part](session)
        except Exception:
            good = False
            session.console.print(f"{part} broke:", style="red")
            session.console.print_exception(max_frames=6)
    return good


def run_apart(parts: Sequence[str], options: argparse.Namespace) -> int:
    """Run the parts one after another, each in its own process; return 1 if one failed."""
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
    """Return 0, 1 if a part failed, or 2 without a GPU. Tests set `device` and `plan`."""
    options = parse(argv)
    parts = [part for part in PARTS if part in (options.parts or PARTS)]
    # The tables do not fit into 80 columns, the default where the output is a file.
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
