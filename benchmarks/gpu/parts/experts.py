"""`lora::grouped_linear`: the experts of a layer, and one parameter as PEFT measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.common.harness import UNSUPPORTED, Timing
from benchmarks.common.report import bar_panels
from benchmarks.common.shapes import shape_name
from benchmarks.gpu.experts import PROJECTIONS, Project, Routing, Stack, block
from benchmarks.gpu.parts.layer import skipped
from benchmarks.gpu.parts.memory import peak_bytes
from benchmarks.gpu.peers import BARE, OURS
from benchmarks.gpu.session import SKIPPED, Session
from benchmarks.gpu.targets.predict import (
    BOTH,
    FORWARD,
    experts_line,
    lines,
    stack_line,
    stack_memory_line,
)
from benchmarks.gpu.timing import AS_CALLED, buffers, measure, rotating

Calls = dict[str, Callable[[], object]]  # by variant
Facts = dict[str, object]  # the columns that say what is measured


def _differentiated(result: Callable[[], Tensor], wanted: list[Tensor]) -> Callable[[], object]:
    """Forward and backward, with a gradient of ones for y that is made once."""
    with torch.no_grad():
        dy = torch.ones_like(result())
    return lambda: torch.autograd.grad(result(), wanted, dy)


def layer_calls(session: Session) -> tuple[dict[str, Calls], Facts, int]:
    """({pass: calls}, what is measured, number of copies used in turn) for a layer's experts."""
    layer, device = session.plan.experts_layer, session.device
    up, down = (Stack.random(p.experts, p.n, p.k, layer.r, device) for p in layer.projections)
    x = torch.randn(layer.tokens, layer.hidden, device=device, dtype=torch.bfloat16)
    x.requires_grad_()
    routing = Routing.random(layer.tokens, layer.experts, layer.top_k, device)

    def forward(project: Project) -> Callable[[], Tensor]:
        return lambda: block(x, up, down, routing, project)

    def both(name: str, project: Project) -> Callable[[], object]:
        factors = [] if name == BARE else [*up.factors, *down.factors]
        return _differentiated(forward(project), [x, routing.weights, *factors])

    calls: dict[str, Calls] = {
        FORWARD: {name: torch.no_grad()(forward(run)) for name, run in PROJECTIONS.items()},
        BOTH: {name: both(name, run) for name, run in PROJECTIONS.items()},
    }
    facts = {"what": "block", "experts": layer.experts, "shape": f"{layer.hidden}, {layer.inner}"}
    facts |= {"tokens": layer.tokens, "top_k": layer.top_k, "r": layer.r}
    return calls, facts, 1  # one copy: it is more than a gigabyte


def parameter(session: Session) -> tuple[Stack, Tensor, Tensor]:
    """One parameter, x with a gradient, and the same number of rows for each expert."""
    p, r, device = session.plan.experts_stack, session.plan.experts_rank, session.device
    x = torch.randn(p.size, p.k, device=device, dtype=torch.bfloat16).requires_grad_()
    ends = torch.arange(1, p.experts + 1, device=device) * p.size // p.experts
    return Stack.random(p.experts, p.n, p.k, r, device), x, ends.to(torch.int32)


def call(name: str, stack: Stack, x: Tensor, ends: Tensor) -> Callable[[], object]:
    """Forward and backward of one variant."""
    wanted = [x] if name == BARE else [x, *stack.factors]
    return _differentiated(lambda: PROJECTIONS[name](x, stack, ends, None), wanted)


def stack_calls(session: Session) -> tuple[dict[str, Calls], Facts, int]:
    """The same for one parameter, whose rows are in the experts' order."""
    p = session.plan.experts_stack
    count = buffers(session.device, p.weight)
    made = [parameter(session) for _ in range(count)]
    calls = {name: rotating([call(name, *each) for each in made]) for name in PROJECTIONS}
    facts = {"what": "one parameter", "experts": p.experts, "shape": shape_name((p.n, p.k))}
    return {BOTH: calls}, facts | {"tokens": p.size, "r": session.plan.experts_rank}, count


def times(session: Session, calls: Calls, copies: int) -> list[Timing]:
    """The timings of all variants."""
    plan = session.plan
    options = {"rounds": plan.rounds, "burst_ms": plan.burst_ms, "kind": AS_CALLED}
    return measure(session.device, calls, multiple=copies, **options)


def peak(session: Session, name: str) -> float | str:
    """The gigabytes at the peak, including W, or the reason why they are missing."""
    if session.over:
        return SKIPPED
    try:
        run = call(name, *parameter(session))
        return peak_bytes(session.device, run)[0] / 1e9
    except UNSUPPORTED as error:
        return f"fails: {type(error).__name__}: {error}"


def section(
    session: Session, made: Callable, line: str
) -> Iterator[tuple[str, Facts, list[Timing]]]:
    """(pass, what is measured, timings) for each pass; the value of a target is recorded."""
    if session.over:
        session.record(line, SKIPPED)
        yield BOTH, {}, skipped([*PROJECTIONS])
        return
    calls, facts, copies = made(session)
    for which, variants in calls.items():
        timings = times(session, variants, copies)
        mine = next(timing for timing in timings if timing.name == OURS)
        if which == BOTH:
            in_ms = line == stack_line(session.plan)
            session.record_timing(line, mine, 1e3 * mine.median if in_ms else mine.ratio())
        yield which, facts, timings


def run(session: Session) -> None:
    """Write experts.csv and .png."""
    plan = session.plan
    aims = {line.name: line.aim for line in lines(session.machine, plan)}
    peaks = {name: peak(session, name) for name in PROJECTIONS}
    session.record(stack_memory_line(plan), peaks[OURS])
    rows: list[dict[str, object]] = []
    panels: dict[str, list[Timing]] = {}
    for made, line in ((layer_calls, experts_line(plan)), (stack_calls, stack_line(plan))):
        for which, facts, timings in section(session, made, line):
            panels[f"{line.removesuffix(f', {BOTH}')}, {which}"] = timings
            for timing in timings:
                row = {**facts, "dtype": "bf16", "adapter_dtype": "fp32", "clock": AS_CALLED}
                row |= {"pass": which, **timing.row()}
                row["peak_gb"] = peaks[timing.name] if made is stack_calls else ""
                row["aim"] = aims[line] if timing.name == OURS and which == BOTH else ""
                rows.append(row)
    title = f"Experts, bf16, {session.environment['device']}"
    shown = {"what": "what", "variant": "variant", "pass": "pass", "median_ms": "ms"}
    shown |= {"ratio": "× bare", "peak_gb": "peak GB", "aim": "aim", "failure": "failure"}
    session.publish("experts", title, rows, shown)
    bar_panels(session.out / "experts.png", f"{title}; (× bare)", panels, xlabel="ms")
