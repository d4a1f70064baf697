"""Hypothesis 3: do the losses fall on one curve when drawn against the magnitude of the update?

The rule, written when only the three lowest rates of LoRA and of LoRAM had run, on one task: take
the finished cells of a task at r = 16, and from them all runs of the first seed that did not
diverge and whose final loss is at most 1.2 times the smallest loss of the task. Two cubic
polynomials are fitted to these runs, one in log ν[ΔW] and one in log η.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.study.methods import METHODS, RANK
from benchmarks.study.plan import SEEDS, rate
from benchmarks.study.report.cells import Study, number
from benchmarks.study.report.hypotheses.finding import Finding, counted, for_whole, missing, planned
from benchmarks.study.report.statistics import Fit, fit

LIMIT = 1.2  # times the smallest loss
LEFT = 0.5  # of the variance that the rate leaves
RUNS = 12  # fewer are not fitted: a cubic has four coefficients


class Trained(NamedTuple):
    """A finished run of the first seed."""

    method: str
    rate: float
    nu_update: float
    nu_weight: float
    loss: float


class Curves(NamedTuple):
    """The two curves of a task, fitted to the runs with losses up to `limit`."""

    fitted: Sequence[Trained]
    limit: float
    of_update: Fit  # of log10 ν[ΔW]
    of_rate: Fit  # of log10 η

    @property
    def left(self) -> float:
        """The variance that the magnitude leaves, as a fraction of the variance that the rate
        leaves.
        """
        of_rate = 1 - self.of_rate.r_squared
        return (1 - self.of_update.r_squared) / of_rate if of_rate else math.inf


def trained_runs(study: Study, task: str) -> list[Trained]:
    """The runs of the task's finished cells at r = 16 that changed W and did not diverge."""
    found = []
    for own in study.tuned:
        if (own.cell.task, own.cell.r) != (task, RANK):
            continue
        for k, loss in own.first.items():
            row = own.runs[SEEDS[0], k]
            sizes = number(row["nu_update"]), number(row["nu_weight"])
            if math.isfinite(loss) and sizes[0] > 0:
                found.append(Trained(own.cell.method, rate(k), *sizes, loss))
    return found


def curves(runs: Sequence[Trained]) -> Curves | None:
    """None if fewer than 12 runs are within the limit."""
    limit = LIMIT * min((run.loss for run in runs), default=math.nan)
    near = [run for run in runs if run.loss <= limit]
    if len(near) < RUNS:
        return None
    losses = [run.loss for run in near]
    of_update = fit([math.log10(run.nu_update) for run in near], losses)
    of_rate = fit([math.log10(run.rate) for run in near], losses)
    return Curves(near, limit, of_update, of_rate)


def on_one_curve(study: Study, task: str) -> list[Finding]:
    """Hypothesis 3 on a task."""
    cells = planned(task, METHODS)
    left = missing(study, cells)
    found = curves(trained_runs(study, task))
    value, detail = None, ""
    if found is not None:
        value = found.left
        detail = (
            f"R² = {found.of_update.r_squared:.3f} of ν[ΔW], {found.of_rate.r_squared:.3f} of the "
            f"rate; {len(found.fitted)} runs"
        )
    verdict = for_whole(value is not None and value < LEFT, left)
    if value is None and not left:
        verdict = f"not decided: fewer than {RUNS} runs within {LIMIT:g} times the smallest loss"
    return [
        Finding(
            *(3, task, "variance left by ν[ΔW] / left by the rate", value, f"< {LEFT:g}", detail),
            cells=counted(cells, left),
            verdict=verdict,
        )
    ]
