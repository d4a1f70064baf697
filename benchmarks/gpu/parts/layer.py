"""Forward and forward + backward of the layer with many tokens, for ours, `nn.Linear` and peers."""

from __future__ import annotations

import torch

from benchmarks.common.harness import Timing
from benchmarks.common.report import bar_panels
from benchmarks.common.shapes import Shape, shape_name
from benchmarks.gpu.peers import (
    BARE,
    NOT_INSTALLED,
    OURS,
    PEERS,
    Layers,
    build,
    forward,
    forward_backward,
)
from benchmarks.gpu.session import SKIPPED, Session
from benchmarks.gpu.targets.costs import BF16
from benchmarks.gpu.targets.predict import BOTH, FORWARD, layer_line, lines
from benchmarks.gpu.timing import AS_CALLED, buffers, measure

PASSES = (FORWARD, BOTH)


def time_layers(
    session: Session,
    layers: Layers,
    x: torch.Tensor,
    which: str,
    *,
    rounds: int,
    burst_ms: float,
    kind: str = AS_CALLED,
) -> list[Timing]:
    """The timings of all kinds of layer on one input, including those not installed."""
    n = layers[BARE][0].out_features
    dy = torch.randn(x.shape[0], n, device=x.device, dtype=x.dtype)
    table = {
        name: forward(some, x) if which == FORWARD else forward_backward(some, x, dy)
        for name, some in layers.items()
        if some
    }
    options = {"rounds": rounds, "burst_ms": burst_ms, "kind": kind}
    timings = measure(session.device, table, multiple=len(layers[BARE]), **options)
    missing = [Timing(name, failure=NOT_INSTALLED) for name in layers if name not in table]
    return timings + missing


def skipped(layers: list[str] | tuple[str, ...] = (BARE, OURS, *PEERS)) -> list[Timing]:
    """The timings of layers that were skipped for lack of time."""
    return [Timing(name, failure=SKIPPED) for name in layers]


def copies(session: Session, shape: Shape) -> int:
    """The number of layers to use in turn, so that no weight is found in the L2 cache."""
    return buffers(session.device, BF16 * shape[0] * shape[1])


def random_input(session: Session, tokens: int, shape: Shape) -> torch.Tensor:
    """A random x [tokens, in] in bf16."""
    return torch.randn(tokens, shape[1], device=session.device, dtype=torch.bfloat16)


def run(session: Session) -> None:
    """Write layer.csv and .png."""
    plan = session.plan
    shape, tokens = plan.layer_shape, plan.layer_tokens
    aims = {line.name: line for line in lines(session.machine, plan)}
    rows: list[dict[str, object]] = []
    panels: dict[str, list[Timing]] = {}
    for r, dropout in plan.layer_cases:
        layers = build(shape, r, dropout, copies(session, shape), session.device)
        for which in PASSES:
            if session.over:
                timings = skipped()
            else:
                x = random_input(session, tokens, shape)
                options = {"rounds": plan.rounds, "burst_ms": plan.burst_ms}
                timings = time_layers(session, layers, x, which, **options)
            name = layer_line(plan, r, dropout, which)
            mine = next(t for t in timings if t.name == OURS)
            session.record_timing(name, mine, mine.ratio())
            panels[f"r = {r}, dropout {dropout:g}, {which}"] = timings
            facts = {"shape": shape_name(shape), "tokens": tokens, "r": r, "dropout": dropout}
            facts |= {"dtype": "bf16", "adapter_dtype": "fp32", "pass": which, "clock": AS_CALLED}
            for timing in timings:
                aim = aims[name].aim if timing.name == OURS else ""
                rows.append({**facts, **timing.row(), "aim": aim})
    device = session.environment["device"]
    title = f"Layer {shape_name(shape)}, {tokens} tokens, bf16, {device}"
    shown = {"variant": "layer", "r": "r", "dropout": "dropout", "pass": "pass"}
    shown |= {"median_ms": "ms", "ratio": "× bare", "aim": "aim", "failure": "failure"}
    session.publish("layer", title, rows, shown)
    bar_panels(session.out / "layer.png", f"{title}; (× bare)", panels, xlabel="ms")
