"""The device's ceilings: the bandwidth of a copy and the speed of a large bf16 product."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.targets.costs import Machine
from benchmarks.gpu.targets.plan import Plan
from benchmarks.gpu.timing import DEVICE, measure


def measure_ceilings(device: torch.device, plan: Plan, name: str) -> Machine:
    """The medians of both, with random data: zeros would draw less power and run faster."""
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
