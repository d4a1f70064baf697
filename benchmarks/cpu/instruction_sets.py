"""Every operator with the kernels of several instruction sets.

`python -m benchmarks.cpu.instruction_sets`. It runs on one thread and measures the CPU time of this
thread, not the elapsed time, so other processes disturb it little. Each operator is compared with a
yardstick (the floor of an initialization, `svd_lowrank` at niter 16, the float32 layer) and with
its reference in plain torch; `make bench-avx2` limits both of these to AVX2.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common.harness import Variant, dtype_name, environment, interleave
from benchmarks.common.report import RESULTS, print_timings, write_csv
from benchmarks.cpu.init import floor
from benchmarks.cpu.svd import lowrank
from lora_kernels.ops import cpu_capabilities, cpu_capability, set_cpu_capability
from lora_kernels.ops.linear import linear_backward_ref, linear_forward_ref
from lora_kernels.ops.loram_init import loram_init_ref
from lora_kernels.ops.svd.minor_svd import minor_svd_ref
from lora_kernels.ops.svd.randomized_svd import randomized_svd_ref
from lora_kernels.ops.svd.thin_qr import thin_qr_ref

SETS = cpu_capabilities()
Table = dict[str, Callable[..., object] | Variant]
YARDSTICK = "yardstick"
EXTRAS = (1.0, 0.0, None, None, None, None)  # arguments of `linear`: scaling, dropout, ...
NEEDS = [True, False, False, True, True, False]


def clock(variant: Variant) -> float:
    """The CPU time of this thread, in seconds."""
    arguments = () if variant.prepare is None else (variant.prepare(),)
    start = time.thread_time()
    variant.run(*arguments)
    return time.thread_time() - start


def with_set(name: str, run: Callable[..., object]) -> Callable[..., object]:
    """`run` with the kernels of the instruction set `name`."""

    def switched(*arguments: Any) -> None:
        set_cpu_capability(name)
        run(*arguments)

    return switched


def every_set(run: Callable[..., object], prepare: Callable[[], Any] | None = None) -> Table:
    """One variant per instruction set."""
    return {name: Variant(with_set(name, run), prepare) for name in SETS}


def init(size: int, dtype: torch.dtype, r: int) -> Table:
    """`loram_init`, compared with reading W once and rewriting it once."""
    pristine = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    pristine = pristine.to(dtype)
    work = torch.empty_like(pristine)
    refresh = partial(work.copy_, pristine)
    A, B = torch.empty(r, size), torch.empty(size, r)
    beta = torch.empty(1, dtype=torch.float64)
    return {
        YARDSTICK: Variant(floor, refresh),
        **every_set(lambda w: torch.ops.lora.loram_init(w, r, 1.0), refresh),
        "reference": Variant(
            lambda w: loram_init_ref([w], [A], [B], beta, r, 1.0, True), refresh, rounds=2, warmup=0
        ),
    }


def leading(size: int, dtype: torch.dtype, r: int) -> Table:
    """`randomized_svd`, compared with `svd_lowrank`."""
    W = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = partial(randomized_svd_ref, [W], r, 0, 0, 0.0)
    table = {
        YARDSTICK: partial(lowrank, W, r, 16),
        **every_set(partial(torch.ops.lora.randomized_svd, W, r)),
    }
    if r == 16:  # the reference is a whole SVD, whatever the rank
        table["reference"] = Variant(reference, rounds=1, warmup=0)
    return table


def trailing(size: int, dtype: torch.dtype, r: int) -> Table:
    """`minor_svd`, compared with its reference, a whole SVD."""
    W = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = Variant(partial(minor_svd_ref, [W], r, 0), rounds=1, warmup=0)
    return {YARDSTICK: reference, **every_set(partial(torch.ops.lora.minor_svd, W, r))}


def qr(size: int, dtype: torch.dtype, r: int) -> Table:
    """`thin_qr`, compared with its reference."""
    W = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    reference = Variant(partial(thin_qr_ref, [W], r))
    return {YARDSTICK: reference, **every_set(partial(torch.ops.lora.thin_qr, W, r))}


def layer(size: int, dtype: torch.dtype, tokens: int) -> Table:
    """Forward and backward of a layer of rank 16, compared with the same in float32."""

    def both(kind: torch.dtype, forward: Callable, backward: Callable) -> Callable[[], object]:
        x, dy = (torch.randn(tokens, size).to(kind) for _ in range(2))
        W = torch.randn(size, size).mul_(0.02).to(kind)
        A, B = torch.randn(16, size), torch.randn(size, 16)

        def run() -> tuple[Tensor, ...]:
            _, z = forward(x, W, None, A, B, *EXTRAS)
            return backward(dy, x, W, A, B, z, *EXTRAS, NEEDS)

        return run

    ops = torch.ops.lora.linear_forward, torch.ops.lora.linear_backward
    reference = both(dtype, linear_forward_ref, linear_backward_ref)
    table = {YARDSTICK: both(torch.float32, *ops), **every_set(both(dtype, *ops))}
    if tokens <= 64:  # already 8 seconds where torch has no vector code for the dtype
        table["reference"] = Variant(reference, rounds=1, warmup=0)
    return table


CASES = (
    *(("loram_init", init, 4096, d, (16, 128, 512)) for d in (torch.float32, torch.bfloat16)),
    *(
        ("randomized_svd", leading, 2048, d, (16, 64, 128, 256))
        for d in (torch.float32, torch.bfloat16)
    ),
    ("minor_svd", trailing, 2048, torch.float32, (64,)),
    ("thin_qr", qr, 4096, torch.float32, (16,)),
    *(("linear", layer, 4096, d, (1, 64, 512)) for d in (torch.bfloat16, torch.float16)),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cpu.instruction_sets", description=__doc__
    )
    names = list(dict.fromkeys(case[0] for case in CASES))
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--size", type=int, help="size of the weights, for a quick run")
    parser.add_argument("--sets", nargs="+", choices=cpu_capabilities(), default=cpu_capabilities())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write instruction_sets.csv, a row per operator, case and instruction set."""
    options, console, before = parse(argv), Console(), cpu_capability()
    torch.set_num_threads(1)
    SETS[:] = options.sets
    about = environment()
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    del about["kernels"]  # differs from row to row
    rows: list[dict[str, object]] = []
    for operator, make, size, dtype, values in CASES:
        for value in values if operator in options.only else ():
            table = make(options.size or size, dtype, value)
            if options.no_reference:
                table.pop("reference", None)
            timings = interleave(table, rounds=options.rounds, warmup=1, clock=clock)
            label = "tokens" if operator == "linear" else "r"
            facts = {"operator": operator, "size": options.size or size, label: value}
            facts |= {"dtype": dtype_name(dtype)}
            print_timings(console, ", ".join(map(str, facts.values())), timings, YARDSTICK)
            rows += [{**facts, **timing.row(), **about} for timing in timings]
            write_csv(options.out / "instruction_sets.csv", rows)
    set_cpu_capability(before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
