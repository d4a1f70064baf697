"""Peak allocated memory of forward + backward, for one layer of each kind."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.common.harness import UNSUPPORTED
from benchmarks.common.shapes import shape_name
from benchmarks.gpu.parts.layer import random_input
from benchmarks.gpu.peers import BARE, NOT_INSTALLED, OURS, builders, forward_backward, frozen
from benchmarks.gpu.pictures import Bar, aim_bars
from benchmarks.gpu.session import SKIPPED, Session
from benchmarks.gpu.targets.predict import memory_line

AIM = 1.02


def peak_bytes(device: torch.device, run: Callable[[], object]) -> tuple[int, int]:
    """(peak allocated, allocated before the call) in bytes, measured in the second call."""
    run()
    if device.type != "cuda":
        return _peak_on_cpu(run), 0
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), before


def _peak_on_cpu(run: Callable[[], object]) -> int:
    """How much the process grows, because PyTorch does not count the memory allocated on a CPU."""
    from benchmarks.common.memory import PeakGrowth

    with PeakGrowth(sharp=True) as growth:
        run()
    return int(growth.mib * 2**20)


def row_of(session: Session, name: str, builder: Callable[[nn.Linear], nn.Module] | None) -> dict:
    """Create one layer of a kind and measure it."""
    plan = session.plan
    if builder is None or session.over:
        return {"variant": name, "failure": NOT_INSTALLED if builder is None else SKIPPED}
    try:
        x = random_input(session, plan.layer_tokens, plan.layer_shape)
        layer = builder(frozen(plan.layer_shape, session.device))
        dy = torch.randn(x.shape[0], plan.layer_shape[0], device=x.device, dtype=x.dtype)
        peak, before = peak_bytes(session.device, forward_backward([layer], x, dy))
    except UNSUPPORTED as error:
        return {"variant": name, "failure": f"fails: {type(error).__name__}: {error}"}
    return {"variant": name, "peak_mib": peak / 2**20, "growth_mib": (peak - before) / 2**20}


def run(session: Session) -> None:
    """Write memory.csv and .png."""
    plan = session.plan
    r = plan.layer_cases[0][0]
    rows = [row_of(session, name, builder) for name, builder in builders(r).items()]
    bare = next(row for row in rows if row["variant"] == BARE).get("peak_mib") or float("nan")
    facts = {"shape": shape_name(plan.layer_shape), "tokens": plan.layer_tokens, "r": r}
    facts |= {"dtype": "bf16", "adapter_dtype": "fp32"}
    for row in rows:
        row["ratio"] = row.get("peak_mib", float("nan")) / bare
        row["aim"] = AIM if row["variant"] == OURS else ""
        row |= facts
    mine = next(row for row in rows if row["variant"] == OURS)
    session.record(memory_line(plan), mine.get("failure") or mine["ratio"])
    shown = {"variant": "layer", "peak_mib": "peak MiB", "growth_mib": "of it in the pass"}
    shown |= {"ratio": "× bare", "aim": "aim", "failure": "failure"}
    device = session.environment["device"]
    title = f"Memory of forward + backward, {facts['tokens']} tokens, {facts['shape']}, r = {r}"
    session.publish("memory", f"{title}, {device}", rows, shown)
    bars = [Bar(row["variant"], row["ratio"], AIM if row is mine else None) for row in rows]
    aim_bars(session.out / "memory.png", f"{title}, {device}", bars, "peak × bare")
