"""The hypotheses of docs/study.md, each with the numbers that decide it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.study.report.cells import TASKS, Study
from benchmarks.study.report.hypotheses.finding import EVERYTHING, Finding, together
from benchmarks.study.report.hypotheses.losses import as_pissa, nearly_equal
from benchmarks.study.report.hypotheses.magnitude import on_one_curve
from benchmarks.study.report.hypotheses.rates import (
    depend_on_rank,
    differ_as_predicted,
    rank_tasks,
)

_HYPOTHESES: dict[int, tuple[str, Callable[[Study, str], list[Finding]], Sequence[str]]] = {
    1: ("tuned, the starts are nearly equal", nearly_equal, TASKS),
    2: ("the best rates differ, as predicted", differ_as_predicted, TASKS),
    3: ("magnitude is what a start changes", on_one_curve, TASKS),
    4: ("LoRAM trains as PiSSA", as_pissa, TASKS),
    5: ("s ∝ 1/√r keeps the best rate over the ranks", depend_on_rank, rank_tasks()),
}


def findings(study: Study) -> list[Finding]:
    """The verdict on every hypothesis, each followed by the numbers of each task."""
    found = []
    for number, (claim, decide, tasks) in _HYPOTHESES.items():
        parts = [finding for task in tasks for finding in decide(study, task)]
        found += [together(number, claim, parts), *parts]
    return found


__all__ = ["EVERYTHING", "Finding", "findings"]
