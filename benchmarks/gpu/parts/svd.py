"""The time to compute the PiSSA factors of a whole model, extrapolated from one layer per shape.

Exact SVDs and torch's randomized ones are timed on an fp32 layer, ours on a batch of bf16 layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common.harness import UNSUPPORTED, Variant
from benchmarks.common.shapes import Shape, shape_name
from benchmarks.gpu.pictures import Bar, aim_bars
from benchmarks.gpu.session import SKIPPED, Session
from benchmarks.gpu.targets.costs import SVD_NITER
from benchmarks.gpu.targets.predict import init_line
from benchmarks.gpu.timing import Clock

NITERS = (4, SVD_NITER)
BATCH = 32
FIRST_GUESS = 30.0  # seconds allowed for the first exact SVD, which cannot be interrupted
AIM = 10_000
EXACT = "linalg.svd"
OURS = "randomized_svd_foreach"


def exact(weight: Tensor) -> object:
    """A full SVD, as PEFT's PiSSA computes it."""
    return torch.linalg.svd(weight, full_matrices=False)


def seconds_of(session: Session, shape: Shape, run: Callable[[Tensor], object]) -> float | str:
    """The time of one call, or the reason why it failed."""
    try:
        weight = torch.randn(*shape, device=session.device).mul_(shape[1] ** -0.5)
        return Clock(session.device)(Variant(lambda: run(weight)))
    except UNSUPPORTED as error:
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}"


def fits(session: Session, shape: Shape, known: dict[Shape, float]) -> bool:
    """Whether an exact SVD, with n·k·min(n, k) operations, is likely to end within the budget."""

    def work(size: Shape) -> int:
        return size[0] * size[1] * min(size)

    guess = max((s * work(shape) / work(size) for size, s in known.items()), default=FIRST_GUESS)
    return session.seconds_left > 1.5 * guess


def exact_rows(session: Session) -> list[dict[str, object]]:
    """Exact SVDs of one layer of each shape, once each because they take seconds."""
    plan, known, rows = session.plan, {}, []
    if not session.over:
        seconds_of(session, (64, 64), exact)  # loads the solver
    for index, (shape, count) in enumerate(plan.model):
        if index >= plan.svd_shapes:
            seconds: float | str = f"left out of the {plan.name} plan"
        elif not fits(session, shape, known):
            seconds = SKIPPED
        else:
            seconds = seconds_of(session, shape, exact)
        if isinstance(seconds, float):
            known[shape] = seconds
        rows.append(row_of(EXACT, shape, count, "", seconds))
    return rows


def randomized_rows(session: Session, r: int, niter: int) -> list[dict[str, object]]:
    """The second call of `svd_lowrank` for each shape; the first loads its kernels."""
    rows = []
    for shape, count in session.plan.model:
        seconds: float | str = SKIPPED
        for _ in range(2):
            if not session.over:
                seconds = seconds_of(
                    session, shape, lambda w: torch.svd_lowrank(w, q=r, niter=niter)
                )
        rows.append(row_of(lowrank_name(niter), shape, count, r, seconds))
    return rows


def our_rows(session: Session, r: int) -> list[dict[str, object]]:
    """The second call of our operator for each shape, with a batch of bf16 weights."""
    rows = []
    for shape, count in session.plan.model:
        batch, seconds = min(BATCH, count), SKIPPED
        for _ in range(2):
            if not session.over:
                seconds = batch_seconds(session, shape, batch, r)
        per_layer = seconds / batch if isinstance(seconds, float) else seconds
        rows.append(row_of(OURS, shape, count, r, per_layer, "bf16"))
    return rows


def batch_seconds(session: Session, shape: Shape, batch: int, r: int) -> float | str:
    """The time of one call with `batch` weights, or the reason why it failed."""
    try:
        weights = [
            torch.randn(*shape, device=session.device).mul_(shape[1] ** -0.5).bfloat16()
            for _ in range(batch)
        ]
        run = Variant(lambda: torch.ops.lora.randomized_svd_foreach(weights, r))
        return Clock(session.device)(run)
    except UNSUPPORTED as error:
        return f"fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}"


def lowrank_name(niter: int) -> str:
    """The name of `svd_lowrank` in the tables."""
    return f"svd_lowrank niter {niter}"


def row_of(
    what: str, shape: Shape, count: int, r: int | str, seconds: float | str, dtype: str = "fp32"
) -> dict[str, object]:
    """The row of one shape; `extrapolated_s` is one layer's time times the number of layers."""
    failed = isinstance(seconds, str)
    return {
        "what": what,
        "shape": shape_name(shape),
        "dtype": dtype,
        "r": r,
        "layers": count,
        "one_layer_s": "" if failed else seconds,
        "extrapolated_s": "" if failed else seconds * count,
        "failure": seconds if failed else "",
    }


def total_of(session: Session, rows: list[dict[str, object]], r: int) -> dict[str, object]:
    """The sum over the shapes; a lower bound if the time of a shape is missing."""
    parts = [row["extrapolated_s"] for row in rows if not row["failure"]]
    total = sum(parts) if parts else math.nan
    ours_ms = session.milliseconds(init_line(session.plan, r))
    ratio = math.nan if ours_ms is None else 1e3 * total / ours_ms
    complete = len(parts) == len(rows)
    return {
        "what": rows[0]["what"],
        "shape": "all, extrapolated" if complete else "all, extrapolated: a lower bound",
        "dtype": rows[0]["dtype"],
        "r": r,
        "layers": session.plan.projections,
        "extrapolated_s": total,
        "times_ours": ratio,
        "aim": AIM if rows[0]["what"] == EXACT else "",
        "failure": "" if parts else "no shape was measured",
    }


def record_randomized(
    session: Session, r: int, peer: dict[str, object], mine: dict[str, object]
) -> None:
    """Store how many times faster ours is than `svd_lowrank` at the same accuracy."""
    name = init_line(session.plan, r, "PiSSA")
    failure = mine["failure"] or peer["failure"]
    if failure:
        session.record(name, str(failure))
    else:
        session.record(name, peer["extrapolated_s"] / mine["extrapolated_s"])


def run(session: Session) -> None:
    """Write init_svd.csv and .png."""
    plan, bars = session.plan, []
    exacts = exact_rows(session)
    rows = list(exacts)
    for r in plan.init_ranks:
        by_peer = {niter: randomized_rows(session, r, niter) for niter in NITERS}
        mine = our_rows(session, r)
        totals = [total_of(session, part, r) for part in (exacts, *by_peer.values(), mine)]
        rows += [row for part in (*by_peer.values(), mine, totals) for row in part]
        record_randomized(session, r, totals[-2], totals[-1])
        bars += [
            Bar(f"{t['what']}, against r = {r}", t["times_ours"], t["aim"] or None, "≥")
            for t in totals
        ]
        if math.isnan(totals[0]["times_ours"]):
            why = exacts[0]["failure"] or "our own time is missing"
            session.record(init_line(plan, r, "exact SVD"), str(why))
        else:
            session.record(init_line(plan, r, "exact SVD"), totals[0]["times_ours"])
    shown = {"what": "SVD", "shape": "shape", "r": "r", "one_layer_s": "one layer, s"}
    shown |= {"layers": "× layers", "extrapolated_s": "extrapolated, s"}
    shown |= {"times_ours": "× ours", "aim": "aim", "failure": "failure"}
    device = session.environment["device"]
    title = "SVD starts: one layer of each shape is measured once, the model's time extrapolated"
    session.publish("init_svd", f"{title}, {device}", rows, shown)
    picture = session.out / "init_svd.png"
    aim_bars(picture, f"SVD starts, extrapolated, {device}", bars, "× ours", log=True)
