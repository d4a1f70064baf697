"""How long a layer's initialization takes: LoRAM, PEFT's methods, and the least time possible.

`python -m benchmarks.cpu.init`. The floor is `W.norm()` and `W.mul_(c)`, which read W once and
rewrite it once: no method that depends on all of W and subtracts its factors from W can do less.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners import lora as peft_lora
from rich.console import Console
from torch import Tensor, nn

from benchmarks.common.harness import Timing, Variant, dtype_name, environment, interleave
from benchmarks.common.report import RESULTS, bar_panels, print_timings, write_csv
from benchmarks.common.shapes import Shape, shape, shape_name
from lora_kernels import LoRALinear

SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096))
RANKS = (16, 128)
SWEEP_RANKS = (8, 16, 32, 64, 128, 256, 512)
FLOOR = "norm + mul_"
OURS = "LoRAM"


def pretrained_like(size: Shape, dtype: torch.dtype) -> Tensor:
    """Noise plus a few strong directions; the directions determine the cost of an iterative SVD."""
    n, m = size
    generator = torch.Generator().manual_seed(0)
    strength = torch.arange(1, 65).float().pow(-0.5)
    left, right = (torch.randn(k, 64, generator=generator) / k**0.5 for k in size)
    bulk = torch.randn(n, m, generator=generator).div_((n * m) ** 0.25 * 2)
    return bulk.addmm_(left * strength, right.T).mul_(0.5).to(dtype)


def floor(weight: Tensor) -> None:
    """Read W once and rewrite it once."""
    weight.norm()
    weight.mul_(0.999)


def adapted(weight: Tensor, r: int, start: str = "loram") -> LoRALinear:
    """Our layer, as a user creates it."""
    linear = frozen_linear(weight)
    return LoRALinear.from_linear(linear, r=r, lora_alpha=r, init_lora_weights=start)


def peft_adapted(weight: Tensor, r: int, how: bool | str) -> nn.Module:
    """PEFT's layer, as `get_peft_model` creates it."""
    config = LoraConfig(r=r, lora_alpha=r, init_lora_weights=how)
    return peft_lora.Linear(frozen_linear(weight), "default", config, r=r, lora_alpha=r)


def frozen_linear(weight: Tensor) -> nn.Linear:
    """A layer that uses `weight` itself, without allocating memory."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def variants(pristine: Tensor, r: int, slow_rounds: int, medium_rounds: int) -> dict[str, Variant]:
    """The variants by name; each is given an unmodified W."""
    work = torch.empty_like(pristine)

    def variant(run: Callable[[Tensor], object], rounds: int | None = None) -> Variant:
        # One round of a slow variant takes as long as all rounds of the others: no warmup.
        return Variant(run, partial(work.copy_, pristine), rounds, None if rounds is None else 0)

    table = {
        FLOOR: variant(floor),
        OURS: variant(lambda w: torch.ops.lora.loram_init(w, r, 1.0)),
        "LoRALinear (LoRAM)": variant(lambda w: adapted(w, r)),
        "LoRALinear (PiSSA)": variant(lambda w: adapted(w, r, "pissa"), medium_rounds),
        "LoRALinear (OLoRA)": variant(lambda w: adapted(w, r, "olora"), medium_rounds),
        "PEFT True": variant(lambda w: peft_adapted(w, r, True)),
        "PEFT pissa_niter_4": variant(lambda w: peft_adapted(w, r, "pissa_niter_4"), medium_rounds),
        "PEFT pissa_niter_16": variant(
            lambda w: peft_adapted(w, r, "pissa_niter_16"), medium_rounds
        ),
    }
    if slow_rounds:
        table["PEFT olora"] = variant(lambda w: peft_adapted(w, r, "olora"), slow_rounds)
        # PEFT computes this SVD in fp32 for bf16 weights too, so skipping it there saves half a
        # minute.
        if pristine.dtype == torch.float32:
            table["PEFT pissa"] = variant(lambda w: peft_adapted(w, r, "pissa"), slow_rounds)
    return table


def rows_of(timings: Sequence[Timing], facts: dict[str, object]) -> list[dict[str, object]]:
    """The rows of the CSV, with each variant's time relative to LoRAM's operator."""
    ours = next(t.median for t in timings if t.name == OURS)
    return [{**facts, **t.row(), "times_of_loram": t.median / ours} for t in timings]


def peers(console: Console, options: argparse.Namespace) -> None:
    """Compare all variants for all shapes, ranks and dtypes."""
    rows: list[dict[str, object]] = []
    panels: dict[str, list[Timing]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for size in options.shapes:
            pristine = pretrained_like(size, dtype)
            for r in options.ranks:
                label = f"{shape_name(size)}, r = {r}, {dtype_name(dtype)}"
                table = variants(pristine, r, options.slow_rounds, options.medium_rounds)
                timings = interleave(table, rounds=options.rounds, baseline=FLOOR)
                print_timings(console, label, timings, "floor")
                facts = {"shape": shape_name(size), "r": r, "dtype": dtype_name(dtype)}
                rows += rows_of(timings, {**facts, **environment()})
                panels[label] = timings
    write_csv(options.out / "init.csv", rows)
    title = f"Initializing one layer, {environment()['device']}; (× {FLOOR})"
    bar_panels(options.out / "init.png", title, panels, xlabel="ms, log scale", log=True)


def sweep(console: Console, options: argparse.Namespace) -> None:
    """Compare LoRAM with the floor at all ranks."""
    size = options.shapes[0]
    pristine = pretrained_like(size, torch.float32)
    work = torch.empty_like(pristine)
    refresh = partial(work.copy_, pristine)
    table = {FLOOR: Variant(floor, refresh)} | {
        f"{OURS} r = {r}": Variant(partial(torch.ops.lora.loram_init, rank=r), refresh)
        for r in SWEEP_RANKS
        if r <= min(size)
    }
    timings = interleave(table, rounds=options.rounds, baseline=FLOOR)
    label = f"{shape_name(size)}, fp32"
    print_timings(console, f"{label}, by rank", timings, "floor")
    facts = {"shape": shape_name(size), "dtype": "fp32", **environment()}
    write_csv(options.out / "init_ranks.csv", [{**facts, **t.row()} for t in timings])
    title = f"LoRAM by rank, {environment()['device']}; (× {FLOOR})"
    bar_panels(options.out / "init_ranks.png", title, {label: timings}, xlabel="ms", columns=1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.init", description=__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--medium-rounds", type=int, default=5, help="rounds of randomized SVDs")
    parser.add_argument("--slow-rounds", type=int, default=1, help="rounds of exact SVDs and QRs")
    parser.add_argument(
        "--no-slow",
        dest="slow_rounds",
        action="store_const",
        const=0,
        help="skip exact SVDs and QRs",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the CSV and PNG files"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each configuration as soon as it is measured."""
    warnings.filterwarnings("ignore", module="peft")
    options, console = parse(argv), Console()
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    sweep(console, options)
    peers(console, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
