"""Repeat a named part of the published runs, and compare every digit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common.harness import environment
from benchmarks.common.report import print_table
from benchmarks.study.methods import METHODS, RANK
from benchmarks.study.plan import SEEDS, Cell, finalists
from benchmarks.study.running import Runner, losses_of
from benchmarks.study.store import Row, RunKey, Store

# The named part: the three best rates of two methods, first seed. Some minutes.
CHECKED = [Cell("sentiment", method, RANK) for method in ("lora", "loram")]
COMPARED = ("status", "start_loss", "loss", "start_metric", "metric", "nu_update", "step_size")
SAME = ("torch_kernels", "kernels", "processor", "torch")  # otherwise digits may differ


def check(folder: Path, device: torch.device, console: Console) -> bool:
    """Whether the runs of `CHECKED` agree with the rows in `folder`; prints both.

    If torch or the instruction set differs from the published row's, a difference is shown but is
    not a failure.
    """
    published = Store.read(folder)
    with tempfile.TemporaryDirectory() as scratch:
        repeated = Store(Path(scratch))
        runner = Runner(repeated, device, lambda run: None)
        for cell in CHECKED:
            losses = losses_of(published, cell, SEEDS[0])
            with console.status(f"Repeating {cell.title}, seed {SEEDS[0]}, the three best rates"):
                runner.repeat(cell, SEEDS[0], finalists(losses))
    if not repeated.finished:
        console.print("No published run to repeat yet.")
        return True
    found = environment(device)
    here = {name: found.get(name, "") for name in SAME}
    pairs = [(key, published[key], row) for key, row in repeated.finished.items()]
    print_table(console, "Published and repeated", [_line(*pair, here) for pair in pairs])
    return all(_equal(old, new) or not _same_place(old, here) for _, old, new in pairs)


def _line(key: RunKey, old: Row, new: Row, here: Row) -> dict[str, str]:
    verdict = "equal to the last digit" if _equal(old, new) else "DIFFERS"
    if not _equal(old, new) and not _same_place(old, here):
        verdict = f"differs, on {here['torch_kernels']} (published: {old['torch_kernels']})"
    return {
        "run": f"{METHODS[key.method].title}, lr {key.lr}",
        "published loss": old["loss"],
        "repeated": new["loss"],
        "": verdict,
    }


def _equal(old: Row, new: Row) -> bool:
    return all(old[column] == new[column] for column in COMPARED)


def _same_place(old: Row, here: Row) -> bool:
    return all(old[name] == here[name] for name in SAME)
