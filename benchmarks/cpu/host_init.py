"""How long `loram_init_foreach` of a whole model takes until each of its kernels is launched.

`python -m benchmarks.cpu.host_init`. It runs on any machine: the tensors are on the CPU, nothing is
computed, and `stand_in` records the times of the launches. The weights are Llama-2-7B's 224
projections with both sizes divided by 16; except in the CPU's allocator, the host's time does not
depend on the sizes. The calls of the CUDA driver are not included: 448 allocations, four copies of
tables from pinned memory, and queueing the launches.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections import defaultdict

os.environ.pop("TRITON_INTERPRET", None)

import torch
from rich.console import Console

from benchmarks.common.harness import environment
from benchmarks.common.report import RESULTS, print_table, short, write_csv
from benchmarks.cpu.stand_in import stand_in
from benchmarks.gpu.targets.plan import FULL
from lora_kernels.ops._backends import triton as backend

AIMS = {"stats_kernel": 300, "subtract_kernel": 1500}  # microseconds
RANK, ROUNDS, WARMUP, SMALLER = 16, 300, 20, 16


def launch_times() -> dict[str, list[float]]:
    """Microseconds from the call to the last launch of each kernel, for each round."""
    weights = [
        torch.empty(n // SMALLER, k // SMALLER, dtype=torch.bfloat16)
        for (n, k), count in FULL.model
        for _ in range(count)
    ]
    library = torch.library.Library("lora", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about overriding the CPU's kernels
        for name, kernel in backend.KERNELS.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    times: dict[str, list[float]] = defaultdict(list)
    try:
        with stand_in(keep_times=True) as seen:
            for index in range(WARMUP + ROUNDS):
                start = time.perf_counter()
                torch.ops.lora.loram_init_foreach(weights, RANK, 1.0, check=False)
                if index >= WARMUP:
                    for name, at in seen.last_launch.items():
                        times[name].append(1e6 * (at - start))
    finally:
        library._destroy()
    return times


def main() -> None:
    """Measure, print, and write results/host_init.csv."""
    rows = []
    for name, times in launch_times().items():
        low, middle, _ = statistics.quantiles(times, n=4)
        row = {"launch": name, "weights": FULL.projections, "r": RANK, "median_us": middle}
        rows.append({**row, "q1_us": low, "min_us": min(times), "aim_us": AIMS.get(name, "")})
    write_csv(RESULTS / "host_init.csv", [{**row, **environment()} for row in rows])
    shown = ("launch", "median_us", "q1_us", "min_us", "aim_us")
    cells = [
        {k: short(row[k]) if isinstance(row[k], float) else str(row[k]) for k in shown}
        for row in rows
    ]
    title = f"loram_init_foreach of {FULL.projections} weights: the host's time until each launch"
    print_table(Console(), title, cells)


if __name__ == "__main__":
    main()
