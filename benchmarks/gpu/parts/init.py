"""Initializing a model with Llama-2-7B's shapes, compared with two reads and one write of W."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.common.harness import Timing, Variant
from benchmarks.gpu.pictures import Bar, aim_bars
from benchmarks.gpu.session import SKIPPED, Session
from benchmarks.gpu.targets.plan import Plan
from benchmarks.gpu.targets.predict import init_floor, init_line
from benchmarks.gpu.timing import measure

AIM, AIM_MS = 1.3, 15


def model_weights(plan: Plan, device: torch.device) -> list[Tensor]:
    """Random weights for all projections in bf16, of a pretrained model's magnitude."""
    return [
        torch.randn(n, k, device=device, dtype=torch.bfloat16).mul_(k**-0.5)
        for (n, k), count in plan.model
        for _ in range(count)
    ]


def time_init(session: Session) -> list[Timing]:
    """The time of one call per round, each with fresh copies of the weights."""
    plan = session.plan
    names = {f"loram_init_foreach, r = {r}": r for r in plan.init_ranks}
    if session.over:
        return [Timing(name, failure=SKIPPED) for name in names]
    pristine = model_weights(plan, session.device)
    work = [torch.empty_like(weight) for weight in pristine]
    refresh = partial(torch._foreach_copy_, work, pristine)

    def variant(r: int) -> Variant:
        return Variant(lambda _: torch.ops.lora.loram_init_foreach(work, r, 1.0), refresh)

    table = {name: variant(r) for name, r in names.items()}
    return measure(session.device, table, rounds=plan.rounds)


def run(session: Session) -> None:
    """Write init.csv and .png."""
    plan = session.plan
    floor = init_floor(plan, session.machine.copy)
    rows, bars = [], []
    for timing, r in zip(time_init(session), plan.init_ranks, strict=True):
        ratio = timing.median / floor
        session.record_timing(init_line(plan, r), timing, ratio)
        session.record_timing(init_line(plan, r, "time"), timing, 1e3 * timing.median)
        facts = {"projections": plan.projections, "r": r, "dtype": "bf16", **timing.row()}
        facts |= {"floor_ms": 1e3 * floor, "times_floor": ratio}
        rows.append({**facts, "aim_times_floor": AIM, "aim_ms": AIM_MS})
        bars.append(Bar(timing.name, ratio, AIM))
    shown = {"variant": "all at once", "median_ms": "ms", "aim_ms": "aim ms"}
    shown |= {"floor_ms": "floor ms", "times_floor": "× floor", "aim_times_floor": "aim"}
    shown |= {"rounds": "rounds", "failure": "failure"}
    title = f"Initializing {plan.projections} projections, {session.environment['device']}"
    session.publish("init", f"{title}; floor: two reads and one write of W", rows, shown)
    aim_bars(session.out / "init.png", title, bars, "× floor")
