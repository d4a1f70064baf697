"""Fine-tune a real pretrained model with LoRA from three different initial factors.

All three adapt the 210 attention and MLP projections of SmolLM2-135M and train on the same batches.
The LoRAM model is then saved, loaded into a fresh model and compared. Writes the results and the
loss curves as CSV files, and a plot of the curves.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from benchmarks.common import smollm2
from benchmarks.common.harness import environment
from benchmarks.common.memory import PeakGrowth
from benchmarks.common.report import RESULTS, print_table, write_csv
from examples.demo.curves import curve_rows, draw_curves
from examples.demo.finetune import Curve, Recipe, train
from examples.demo.methods import ALPHA, METHODS, RANK
from examples.demo.roundtrip import TRIPS
from lora_kernels import add_lora, disable_adapters, merge_lora

# A quarter of the arithmetic of 30 steps of 128 tokens, with the same ranking of the three methods
# (final losses at 30 × 128: LoRAM 2.059, PiSSA 2.063, zero B 2.183).
STEPS, TOKENS = 16, 64
PROBE_TEXTS = 2  # the texts whose logits are compared
# Relative to the largest logit. Repeating the same arithmetic gives a difference of zero; adding in
# a different order in all 210 layers gives about 5e-6.
TOLERANCE = 3e-5


@dataclass(frozen=True)
class Task:
    """The model, the data and the training settings, the same for all methods."""

    base: nn.Module
    targets: Sequence[str]
    recipe: Recipe
    training: Sequence[Tensor]
    validation: Sequence[Tensor]

    @cached_property
    def reference(self) -> list[Tensor]:
        """The untouched model's logits."""
        return self.logits(self.base)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> list[Tensor]:
        """The logits of the first few validation texts."""
        return [model(t[None], use_cache=False).logits for t in self.validation[:PROBE_TEXTS]]


@dataclass(frozen=True)
class Outcome:
    """The measurements of one method."""

    method: str
    init_seconds: float
    start_difference: float
    curve: Curve
    init_mib: float
    training_mib: float

    def row(self) -> dict[str, object]:
        """One row of demo.csv."""
        return {
            "method": self.method,
            "init_seconds": self.init_seconds,
            "start_max_abs_delta_logit": self.start_difference,
            "validation_loss_before": self.curve.validation[0],
            "validation_loss_after": self.curve.validation[max(self.curve.validation)],
            "init_peak_growth_mib": self.init_mib,
            "training_peak_growth_mib": self.training_mib,
        }


def run(task: Task, name: str, progress: Progress) -> tuple[Outcome, nn.Module]:
    """Initialize, compare the logits with those of the original model, fine-tune."""
    torch.manual_seed(task.recipe.seed)
    model = copy.deepcopy(task.base)

    config = replace(METHODS[name], target_modules=task.targets)
    bar = progress.add_task(f"{name}: initialize", total=1)
    with PeakGrowth(sharp=True) as init_memory:
        seconds = add_lora(model, config, progress=False).seconds
    progress.advance(bar)
    difference = max_difference(task.logits(model), task.reference)

    bar = progress.add_task(f"{name}: fine-tune", total=task.recipe.steps)
    advance = partial(progress.advance, bar)
    with PeakGrowth() as training_memory:
        curve = train(model, task.recipe, task.training, task.validation, advance)
    return Outcome(name, seconds, difference, curve, init_memory.mib, training_memory.mib), model


def check_round_trips(task: Task, trained: nn.Module, console: Console) -> bool:
    """Save and load in every format, disable and merge the adapters; true if all logits agree."""
    expected, agrees = task.logits(trained), True

    def compare(what: str, model: nn.Module, wanted: list[Tensor]) -> None:
        nonlocal agrees
        limit = TOLERANCE * max(float(logits.abs().max()) for logits in wanted)
        difference = max_difference(task.logits(model), wanted)
        agrees &= difference <= limit
        console.print(
            f"LoRAM, {what}: max |Δlogit| {difference:.2g}, tolerance {limit:.2g}: "
            + ("[green]agrees[/]" if difference <= limit else "[red]DIFFERS[/]")
        )

    for what, trip in TRIPS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "saved"
            loaded = trip(trained, copy.deepcopy(task.base), path)
            mib = sum(file.stat().st_size for file in path.iterdir()) / 2**20
        compare(f"{what} ({mib:.1f} MiB)", loaded, expected)
    with disable_adapters(trained):
        compare("switched off, against the base", trained, task.reference)
    compare("merged", merge_lora(trained), expected)
    return agrees


def max_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference; infinite where `ours` has a NaN or an infinity."""
    if not all(bool(logits.isfinite().all()) for logits in ours):
        return float("inf")
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def show(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Print the final table."""
    formats = {
        "init_seconds": ("init s", ".2f"),
        "start_max_abs_delta_logit": ("start |Δlogit|", ".1e"),
        "validation_loss_before": ("loss before", ".3f"),
        "validation_loss_after": ("loss after", ".3f"),
        "init_peak_growth_mib": ("init +MiB", ".0f"),
        "training_peak_growth_mib": ("train +MiB", ".0f"),
    }
    rows = [
        {"method": outcome.method}
        | {title: format(outcome.row()[key], spec) for key, (title, spec) in formats.items()}
        for outcome in outcomes
    ]
    print_table(console, "Start and short fine-tune", rows)
    console.print(
        "start |Δlogit|: the largest difference to the untouched model. Loss: per token, on texts "
        "that are not trained on. +MiB: how far the process grew while initializing (adapters "
        "included) and while training. All three have one learning rate here; docs/study.md has "
        "each at its own best rate.",
        style="dim",
    )


def load(recipe: Recipe, blocks: int | None, held_out: int | None) -> Task:
    """Adapt the first `blocks` blocks and validate on `held_out` texts; None means all."""
    base, tokenizer = smollm2.load_model(), smollm2.load_tokenizer()
    training, validation = (
        [text[:TOKENS] for text in smollm2.tokenize(tokenizer, part)]
        for part in smollm2.load_texts()
    )
    targets = list(smollm2.target_projections(base, blocks))
    return Task(base, targets, recipe, training, validation[:held_out])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.demo", description=__doc__)
    parser.add_argument("--steps", type=int, help=f"training steps (default {STEPS}, quick 2)")
    parser.add_argument("--lr", type=float, default=2e-5, help="learning rate (default 2e-5)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the initial A and of the order of the batches"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the CSV files and the plot"
    )
    parser.add_argument("--quick", action="store_true", help="a quick check on 14 projections")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if every saved and loaded model agrees with the trained one."""
    options, console = parse(argv), Console()
    steps, batch, blocks, held_out = (2, 2, 2, 2) if options.quick else (STEPS, 4, None, None)
    steps = options.steps or steps
    recipe = Recipe(steps=steps, batch=batch, lr=options.lr, seed=options.seed)
    try:
        with console.status("Loading SmolLM2-135M (20 s the first time: its GGUF is unpacked)"):
            task = load(recipe, blocks, held_out)
    except smollm2.MissingWheelError as error:
        console.print(f"The demo cannot run: {error}", style="red")
        return 1
    facts = {"layers": len(task.targets), "r": RANK, "lora_alpha": ALPHA, "steps": steps}
    facts |= {
        "validation_texts": len(task.validation),
        "tokens_per_text": TOKENS,
        "lr": options.lr,
        "seed": options.seed,
        "dtype": "fp32",
        **environment(),
    }
    console.print("SmolLM2-135M:", ", ".join(f"{key} {value}" for key, value in facts.items()))

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    outcomes: list[Outcome] = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name in METHODS:
            outcome, model = run(task, name, progress)
            outcomes.append(outcome)
            if name == "LoRAM":
                trained = model
    show(console, outcomes)
    agrees = check_round_trips(task, trained, console)

    curves = {outcome.method: outcome.curve for outcome in outcomes}
    write_csv(options.out / "demo.csv", [{**outcome.row(), **facts} for outcome in outcomes])
    write_csv(options.out / "demo_curve.csv", curve_rows(curves))
    title = f"SmolLM2-135M, {len(task.targets)} projections, r = {RANK}, AdamW lr {options.lr:g}"
    draw_curves(options.out / "demo_loss.png", title, curves)
    console.print("Written: demo.csv, demo_curve.csv, demo_loss.png")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
