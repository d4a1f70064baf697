"""The layer at all sizes: tokens × shapes × ranks, both passes, both clocks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.common.harness import Timing
from benchmarks.common.report import print_table
from benchmarks.common.shapes import Shape, shape_name
from benchmarks.gpu.parts.layer import PASSES, copies, random_input, skipped, time_layers
from benchmarks.gpu.peers import OURS, PEERS, build
from benchmarks.gpu.pictures import ratio_maps
from benchmarks.gpu.session import SKIPPED, Session
from benchmarks.gpu.targets.predict import grid_line
from benchmarks.gpu.timing import CLOCKS

TOLERANCE = 1.02
SKIPPED_CELL = "–"


def to_best_peer(timings: Sequence[Timing]) -> tuple[float, str]:
    """(our median divided by the fastest peer's, that peer's name); NaN where one is missing."""
    known = {t.name: t.median for t in timings if not t.failure}
    best = min((name for name in PEERS if name in known), key=known.__getitem__, default="")
    if not best or OURS not in known:
        return math.nan, best
    return known[OURS] / known[best], best


def cells(session: Session) -> Iterator[tuple[Shape, int, int, str, str, list[Timing]]]:
    """(shape, r, tokens, pass, clock, timings) of every cell, including skipped ones."""
    plan = session.plan
    options = {"rounds": plan.grid_rounds, "burst_ms": plan.grid_burst_ms}
    for shape in plan.grid_shapes:
        for r in plan.grid_ranks:
            layers = None
            for tokens in plan.grid_tokens:
                for which in PASSES:
                    for kind in CLOCKS:
                        if session.over:
                            yield shape, r, tokens, which, kind, skipped()
                            continue
                        layers = layers or build(
                            shape, r, 0.0, copies(session, shape), session.device
                        )
                        x = random_input(session, tokens, shape)
                        timings = time_layers(session, layers, x, which, kind=kind, **options)
                        yield shape, r, tokens, which, kind, timings


def run(session: Session) -> None:
    """Write layer_grid.csv and .png; print our time divided by the fastest peer's."""
    rows = []
    ratios: dict[str, list[float]] = {kind: [] for kind in CLOCKS}
    maps: dict[str, dict[tuple[str, str], float]] = {}
    for shape, r, tokens, which, kind, timings in cells(session):
        ratio, best = to_best_peer(timings)
        facts = {"shape": shape_name(shape), "tokens": tokens, "r": r, "pass": which, "clock": kind}
        facts |= {"dtype": "bf16", "adapter_dtype": "fp32"}
        for timing in timings:
            own = timing.name == OURS
            extra = {"ours_to_best_peer": ratio if own else "", "best_peer": best if own else ""}
            rows.append({**facts, **timing.row(), **extra})
        session.save("layer_grid", rows)  # after each cell, in case the run is stopped
        ratios[kind].append(ratio)
        maps.setdefault(f"{shape_name(shape)}, {which}, {kind}", {})[f"{r}", f"{tokens}"] = ratio
    title = f"Our time over the best peer's, {session.environment['device']}"
    show(session, title, maps)
    for kind in CLOCKS:
        conclude(session, kind, ratios[kind])
    ratio_maps(session.out / "layer_grid.png", title, maps, ("r", "tokens"))


def show(session: Session, title: str, maps: Mapping[str, Mapping[tuple[str, str], float]]) -> None:
    """Print a row per shape, pass, clock and rank, with a column per number of tokens."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for label, values in maps.items():
        for (r, tokens), ratio in values.items():
            row = table.setdefault((label, r), {"layer": f"{label}, r = {r}"})
            row[f"{tokens} tokens"] = SKIPPED_CELL if math.isnan(ratio) else f"{ratio:.2f}"
    print_table(session.console, f"{title} (–: skipped or failed, see the CSV)", [*table.values()])


def conclude(session: Session, kind: str, ratios: Sequence[float]) -> None:
    """Count the cells in which ours is slower, and those without a measurement."""
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    slower = sum(ratio > TOLERANCE for ratio in known)
    missing = len(ratios) - len(known)
    session.console.print(
        f"Grid, {kind}: ours is slower than the best peer by more than 2 % in {slower} of "
        f"{len(known)} cells; {missing} cells were skipped or failed"
    )
    if missing:
        reason = f"{slower} of {len(known)} measured; {missing} not measured"
        session.record(grid_line(kind), reason if known else SKIPPED)
    else:
        session.record(grid_line(kind), float(slower))
