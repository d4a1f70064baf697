"""The multiprocessor resources of each compiled kernel, as a table in the repository:
resources.csv.

A change that costs registers or shared memory thus shows in its commit. The numbers hold for the
version of Triton named in the table.
"""

from __future__ import annotations

import collections
import csv
from pathlib import Path

import triton

TABLE = Path(__file__).with_name("resources.csv")
COLUMNS = (
    *("triton", "case", "kernel", "launch", "arch", "warps", "stages"),
    *("registers", "stack", "shared", "programs", "constants"),
)
REGISTERS, WARPS, BLOCKS = (
    65_536,
    64,
    32,
)  # of a multiprocessor of compute capability 8.0, 9.0, 10.0
SHARED = {80: 167_936, 90: 233_472, 100: 233_472}  # bytes of one, of which each block takes 1 KiB
PER_BLOCK = 1024


def programs(arch: int, registers: int, shared: int, warps: int) -> int:
    """How many programs of a kernel a multiprocessor holds at once (the CUDA occupancy rules)."""
    of_a_warp = -(-registers * 32 // 256) * 256  # registers come in units of 256 a warp
    # Each quarter of a multiprocessor has a quarter of the registers, for whole warps.
    warps_held = min(WARPS, 4 * (REGISTERS // 4 // of_a_warp))
    return min(warps_held // warps, SHARED[arch] // (shared + PER_BLOCK), BLOCKS)


def fit_together(reports: list[dict]) -> bool:
    """Whether a multiprocessor holds a program of each of these at once."""
    registers = sum(-(-r["registers"] * 32 // 256) * 256 * r["num_warps"] for r in reports)
    shared = sum(r["shared"] + PER_BLOCK for r in reports)
    return registers <= REGISTERS and shared <= SHARED[reports[0]["arch"]]


def rows(reports: list[dict]) -> list[dict[str, str]]:
    """The table rows of some reports; `launch` numbers the launches of a kernel in a case."""
    launches = collections.Counter()
    table = []
    for report in reports:
        about = report["case"], report.get("kernel"), report["arch"]
        launches[about] += 1
        if "registers" not in report:
            continue  # an error, or left out
        named = report["arguments"].items()
        pointers = [kind.removesuffix("/16")[1:] for _, kind in named if kind.startswith("*")]
        constants = [f"{name}={value}" for name, value in named if name.isupper()]
        resources = (report[name] for name in ("arch", "registers", "shared", "num_warps"))
        row = {
            "triton": triton.__version__,
            "launch": launches[about],
            "programs": programs(*resources),
            "warps": report["num_warps"],
            "stages": report["num_stages"],
            "constants": " ".join([*dict.fromkeys(pointers), *constants]),
        }
        row = {name: str(row.get(name, report.get(name))) for name in COLUMNS}
        table.append(row)
    return table


def place(row: dict[str, str]) -> tuple[str, ...]:
    """Which launch a row of the table is about."""
    return tuple(row[name] for name in ("case", "kernel", "launch", "arch"))


def read() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def write(reports: list[dict]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows(reports))
