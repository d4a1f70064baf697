"""The layer with few tokens, in a CUDA graph of several layers with different weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.common.harness import UNSUPPORTED, Timing
from benchmarks.common.shapes import Shape, shape_name
from benchmarks.gpu.parts.layer import random_input, skipped
from benchmarks.gpu.peers import ADDMM, BARE, NAIVE, OURS, build
from benchmarks.gpu.pictures import Bar, aim_bars
from benchmarks.gpu.session import Session
from benchmarks.gpu.targets.predict import decode_line
from benchmarks.gpu.timing import DEVICE, measure

AIM = 1.15
LAYERS = (BARE, OURS, NAIVE, ADDMM)


def capture(layers: Sequence[nn.Module], x: torch.Tensor) -> Callable[[], object]:
    """A function that replays all layers, one after another; on a CPU it calls them."""

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        return [layer(x) for layer in layers]

    if x.device.type != "cuda":
        return run
    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and choose kernels, which is not possible in a capture
            run()
    torch.cuda.current_stream(x.device).wait_stream(stream)
    torch.cuda.synchronize(x.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay(kept=(layers, x, outputs)) -> None:
        """`kept` keeps alive all tensors that the graph reads and writes."""
        graph.replay()

    return replay


def time_decode(session: Session, tokens: int, shape: Shape) -> list[Timing]:
    """The timings of a replay, which calls each layer once."""
    plan = session.plan
    if session.over:
        return skipped(LAYERS)
    built = build(shape, plan.decode_rank, 0.0, plan.decode_layers, session.device)
    x = random_input(session, tokens, shape)
    table, failed = {}, []
    for name in LAYERS:
        try:
            table[name] = capture(built[name], x)
        except UNSUPPORTED as error:
            failed.append(Timing(name, failure=f"no capture: {type(error).__name__}: {error}"))
    if not table:
        return failed
    options = {"rounds": plan.rounds, "burst_ms": plan.burst_ms, "kind": DEVICE}
    return measure(session.device, table, **options) + failed


def run(session: Session) -> None:
    """Write decode.csv and .png. The times are per layer: a replay's divided by the layers."""
    plan, rows, bars = session.plan, [], []
    for shape in plan.grid_shapes:
        for tokens in plan.decode_tokens:
            timings = time_decode(session, tokens, shape)
            facts = {"shape": shape_name(shape), "tokens": tokens, "r": plan.decode_rank}
            facts |= {"dtype": "bf16", "adapter_dtype": "fp32", "layers": plan.decode_layers}
            for timing in timings:
                timing.seconds = {i: s / plan.decode_layers for i, s in timing.seconds.items()}
                aim = AIM if timing.name == OURS else ""
                rows.append({**facts, **timing.row(), "aim": aim})
            mine = next(t for t in timings if t.name == OURS)
            session.record_timing(decode_line(plan, tokens, shape), mine, mine.ratio())
            bars.append(Bar(f"{tokens} tokens, {shape_name(shape)}", mine.ratio(), AIM))
    shown = {"variant": "layer", "shape": "shape", "tokens": "tokens", "median_ms": "ms"}
    shown |= {"ratio": "× bare", "aim": "aim", "failure": "failure"}
    device = session.environment["device"]
    title = f"Decode in a CUDA graph, r = {plan.decode_rank}, bf16, {device}"
    session.publish("decode", title, rows, shown)
    aim_bars(session.out / "decode.png", title, bars, "ours × bare")
