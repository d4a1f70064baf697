"""Comparisons of tuned methods, adjusted within their family."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from benchmarks.study.methods import RANK, REFERENCE
from benchmarks.study.plan import Cell
from benchmarks.study.report.cells import Measured, Study
from benchmarks.study.report.statistics import Difference, holm, paired_difference, verdict


class Comparison(NamedTuple):
    """A difference of final losses, and its p adjusted over a family of comparisons."""

    difference: Difference
    p_holm: float

    @property
    def verdict(self) -> str:
        """better, worse, or no clear difference."""
        return verdict(self.difference.mean, self.p_holm)


def difference(measured: Measured, reference: Measured) -> Difference:
    """The difference of final losses in percent, paired by seed, each at its best rate."""
    return paired_difference(measured.at_best("loss"), reference.at_best("loss"))


def fresh_difference(measured: Measured, reference: Measured) -> Difference:
    """The same with the fresh seeds, which were not used to choose a rate."""
    return paired_difference(measured.fresh("loss"), reference.fresh("loss"))


def compare(
    family: Sequence[tuple[Measured, Measured]],
    difference: Callable[[Measured, Measured], Difference] = difference,
) -> dict[Cell, Comparison]:
    """Compare each first cell with its reference; the p are adjusted over all pairs."""
    found = [difference(*pair) for pair in family]
    adjusted = holm([each.p for each in found])
    return {
        measured.cell: Comparison(each, p)
        for (measured, _), each, p in zip(family, found, adjusted, strict=True)
    }


def compare_with_lora(study: Study) -> Mapping[Cell, Comparison]:
    """Compare every tuned cell with LoRA (B = 0) of its task and rank, if LoRA is finished. There
    is one family for each task at r = 16, and one for all other ranks.
    """
    families: dict[str, list[tuple[Measured, Measured]]] = defaultdict(list)
    for measured in study.tuned:
        cell = measured.cell
        reference = study.reference(cell)
        if cell.method != REFERENCE and reference is not None:
            families[cell.task if cell.r == RANK else "ranks"].append((measured, reference))
    return {cell: found for family in families.values() for cell, found in compare(family).items()}


def confirm(study: Study, reference: str = REFERENCE) -> Mapping[Cell, Comparison]:
    """Compare every cell at r = 16 that has run with the fresh seeds with the `reference` method of
    its task, on the fresh seeds. There is one family for each task.
    """
    families: dict[str, list[tuple[Measured, Measured]]] = defaultdict(list)
    for measured in study.tuned:
        task, method, r = measured.cell.task, measured.cell.method, measured.cell.r
        against = study.get(task, reference)
        ready = r == RANK and method != reference and against is not None
        if ready and measured.fresh("loss") and against.fresh("loss"):
            families[task].append((measured, against))
    return {
        cell: found
        for family in families.values()
        for cell, found in compare(family, fresh_difference).items()
    }
