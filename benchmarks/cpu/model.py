"""How long a whole model takes to adapt: `add_lora` and PEFT's `get_peft_model`, on SmolLM2-135M.

`python -m benchmarks.cpu.model`. All 210 attention and MLP projections are adapted, in fp32. Each
round adapts a fresh copy of the model; the copying is not timed.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn

from benchmarks.common import smollm2
from benchmarks.common.harness import Variant, environment, interleave
from benchmarks.common.report import RESULTS, print_timings, write_csv
from lora_kernels import LoRAConfig, add_lora

RANK = 16
BASELINE = "PEFT lora"
OURS = ("lora", "loram", "pissa", "olora")
# By name: PEFT's `init_lora_weights`, and the number of rounds if the default takes too long.
PEERS: dict[str, tuple[bool | str, int | None]] = {
    BASELINE: (True, None),
    "PEFT pissa_niter_4": ("pissa_niter_4", 2),
    "PEFT pissa_niter_16": ("pissa_niter_16", 2),
    "PEFT pissa": ("pissa", 1),
    "PEFT olora": ("olora", 2),
}


def ours(start: str) -> Callable[[nn.Module], object]:
    """A function that adapts a model with `add_lora`."""
    config = LoRAConfig(r=RANK, lora_alpha=RANK, init_lora_weights=start)
    return lambda model: add_lora(model, config, progress=False)


def peers(targets: Sequence[str], how: bool | str) -> Callable[[nn.Module], object]:
    """A function that adapts a model with `get_peft_model`."""

    def run(model: nn.Module) -> object:
        options = {"r": RANK, "lora_alpha": RANK, "target_modules": list(targets)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_peft_model(model, LoraConfig(init_lora_weights=how, **options))

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table and write model.csv."""
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.model", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file")
    options, console = parser.parse_args(argv), Console()
    base = smollm2.load_model()
    targets = list(smollm2.target_projections(base))

    def fresh() -> nn.Module:
        return copy.deepcopy(base)

    variants = {f"add_lora {start}": Variant(ours(start), prepare=fresh) for start in OURS}
    for name, (how, rounds) in PEERS.items():
        few = {} if rounds is None else {"rounds": rounds, "warmup": 0}
        variants[name] = Variant(peers(targets, how), prepare=fresh, **few)
    timings = interleave(variants, rounds=options.rounds, baseline=BASELINE)
    facts = {"model": "SmolLM2-135M", "layers": len(targets), "r": RANK, "dtype": "fp32"}
    print_timings(console, f"SmolLM2-135M, {len(targets)} layers, r = {RANK}", timings, BASELINE)
    write_csv(options.out / "model.csv", [{**facts, **t.row(), **environment()} for t in timings])
    return 0


if __name__ == "__main__":
    sys.exit(main())
