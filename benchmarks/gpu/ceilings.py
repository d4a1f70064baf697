"""What the device can do at best: the bandwidth of a copy, the rate of a large bf16 product."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.pictures import Bar, aim_bars
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.predict import H200, Machine
from benchmarks.gpu.session import Session
from benchmarks.gpu.timing import DEVICE, measure


def measure_ceilings(device: torch.device, plan: Plan, name: str) -> Machine:
    """The median of both, on random data: zeros would draw less power and run faster."""
    source = torch.randn(plan.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = _median(device, plan, partial(target.copy_, source))
    moved = 2 * source.nbytes
    del source, target
    a, b = (torch.randn(plan.gemm, plan.gemm, device=device, dtype=torch.bfloat16) for _ in "ab")
    product = _median(device, plan, partial(torch.mm, a, b, out=torch.empty_like(a)))
    return Machine(name, copy=moved / copy, matmul=2 * plan.gemm**3 / product)


def _median(device: torch.device, plan: Plan, run: partial) -> float:
    (timing,) = measure(
        device, {"ceiling": run}, rounds=plan.rounds, burst_ms=2 * plan.burst_ms, kind=DEVICE
    )
    if timing.failure:
        raise RuntimeError(timing.failure)
    return timing.median


def run(session: Session) -> None:
    """ceilings.csv and .png; the H200's earlier figures stand beside."""
    machine, plan = session.machine, session.plan
    rows = [
        {
            "ceiling": "copy, bytes read + written",
            "size": f"{plan.copy_bytes / 2**20:g} MiB",
            "dtype": "fp32",
            "measured": machine.copy / 1e12,
            "unit": "TB/s",
            "h200_earlier": H200.copy / 1e12,
        },
        {
            "ceiling": "matmul, random data",
            "size": f"{plan.gemm}³",
            "dtype": "bf16",
            "measured": machine.matmul / 1e12,
            "unit": "TFLOP/s",
            "h200_earlier": H200.matmul / 1e12,
        },
    ]
    shown = {"ceiling": "ceiling", "size": "size", "dtype": "dtype", "measured": "measured"}
    shown |= {"unit": "unit", "h200_earlier": "an H200 earlier"}
    session.publish("ceilings", f"Ceilings, {session.environment['device']}", rows, shown)
    bars = [
        Bar(f"{row['ceiling']}, {row['unit']}", row["measured"] / row["h200_earlier"])
        for row in rows
    ]
    title = f"Ceilings, {session.environment['device']}"
    aim_bars(session.out / "ceilings.png", title, bars, "relative to an H200 measured earlier")
