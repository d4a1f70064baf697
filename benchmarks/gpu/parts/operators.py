"""The bandwidth of `dst_basis`, `frobenius_stats`, `row_norms` and `subtract_dst_`, relative to a
copy's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common.harness import Timing, dtype_name
from benchmarks.common.shapes import shape_name
from benchmarks.gpu.pictures import Bar, aim_bars
from benchmarks.gpu.session import SKIPPED, Session
from benchmarks.gpu.targets.cases import OperatorCase, operator_cases
from benchmarks.gpu.timing import DEVICE, buffers, measure, rotating

AIM = 0.85
ops = torch.ops.lora


def prepare(case: OperatorCase, device: torch.device) -> tuple[Callable[[], object], int]:
    """(a function that makes one call, the number of buffers that it uses in turn)."""
    count = buffers(device, case.footprint)
    if case.operator == "dst_basis":
        # Keep the results, so that the allocator does not return the same block each time.
        kept: deque = deque(maxlen=count)
        size, options = max(case.shape), {"dtype": case.dtype, "device": device}
        return lambda: kept.append(ops.dst_basis(size, case.rank, **options)), count
    weights = [
        torch.randn(*case.shape, device=device, dtype=case.dtype).mul_(case.shape[1] ** -0.5)
        for _ in range(count * case.weights)
    ]
    if case.operator == "frobenius_stats":
        step = case.weights
        lists = [weights[i : i + step] for i in range(0, len(weights), step)]
        return rotating([partial(ops.frobenius_stats, some) for some in lists]), count
    if case.operator == "row_norms":
        (n, k), r = case.shape, case.rank
        factors = torch.randn(r, k, device=device), torch.randn(n, r, device=device)
        return rotating([partial(ops.row_norms, w, *factors, 1e-2) for w in weights]), count
    # Too small to change W, however often it is subtracted.
    coefficient = torch.tensor(1e-6, dtype=torch.float64, device=device)
    calls = [partial(ops.subtract_dst_, w, coefficient, case.rank) for w in weights]
    return rotating(calls), count


def time_case(session: Session, case: OperatorCase) -> Timing:
    """The timing of one case, or the reason why there is none."""
    if session.over:
        return Timing(case.name, failure=SKIPPED)
    run, count = prepare(case, session.device)
    plan = session.plan
    options = {"rounds": plan.rounds, "burst_ms": plan.burst_ms, "kind": DEVICE}
    (timing,) = measure(session.device, {case.name: run}, multiple=count, **options)
    return timing


def run(session: Session) -> None:
    """Write operators.csv and .png."""
    rows, bars = [], []
    for case in operator_cases(session.plan):
        timing = time_case(session, case)
        speed = case.bytes / timing.median  # NaN if it failed
        share = speed / session.machine.copy
        session.record_timing(case.name, timing, share)
        rows.append(
            {
                "operator": case.operator,
                "shape": shape_name(case.shape),
                "dtype": dtype_name(case.dtype),
                "rank": case.rank or "",
                "weights": case.weights,
                **timing.row(),
                "gb_per_s": speed / 1e9,
                "share_of_copy": share,
                "aim": AIM,
            }
        )
        bars.append(Bar(case.name, share, AIM, "≥"))
    shown = {"variant": "operator", "median_ms": "ms", "gb_per_s": "GB/s"}
    shown |= {"share_of_copy": "of copy", "aim": "aim", "rounds": "rounds", "failure": "failure"}
    device = session.environment["device"]
    session.publish("operators", f"Operators, device time, {device}", rows, shown)
    aim_bars(session.out / "operators.png", f"Operators, {device}", bars, "share of the copy")
