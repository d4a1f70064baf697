"""A number that decides a hypothesis, and the rules that all verdicts share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from benchmarks.study.methods import METHODS, RANK
from benchmarks.study.plan import Cell
from benchmarks.study.report.cells import PLANNED, Study

HOLDS = "holds"
FAILS = "fails"
NOT_DECIDED = "not decided"
EVERYTHING = "all"  # the scope of the verdict on a whole hypothesis
NAMED = 4  # missing cells that a verdict names


@dataclass(frozen=True)
class Finding:
    """One row of hypotheses.csv.

    Attributes:
        hypothesis: its number in docs/study.md.
        scope: a task, with its rank where that is not 16; "all" for the verdict on the hypothesis.
        quantity: what `value` is; `bound` is the rule that decides.
        value: None where it cannot be computed yet.
        detail: where the value comes from, for the reader.
        cells: how many of the planned cells are finished, as in "9 of 21".
        verdict: holds, fails, "not decided: ..." with what is missing; empty for a number that is
            shown beside the rule.

    """

    hypothesis: int
    scope: str
    quantity: str
    value: float | None = None
    bound: str = ""
    detail: str = ""
    cells: str = ""
    verdict: str = ""


def planned(task: str, methods: Collection[str], ranks: Collection[int] = (RANK,)) -> list[Cell]:
    """The cells of the plan, each once, for these methods and ranks of a task."""
    return [c for c in PLANNED if c.task == task and c.method in methods and c.r in ranks]


def missing(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that are not finished or have no best rate."""
    return [cell for cell in cells if study.get(*_key(cell)) is None]


def counted(cells: Sequence[Cell], left: Sequence[Cell]) -> str:
    return f"{len(cells) - len(left)} of {len(cells)}"


def for_all(holds: bool, left: Sequence[Cell]) -> str:
    """The verdict on a claim about each cell: one exception refutes it, whatever is missing."""
    return FAILS if not holds else not_decided(left) if left else HOLDS


def for_some(holds: bool, left: Sequence[Cell]) -> str:
    """The verdict on a claim that one case proves, whatever is missing."""
    return HOLDS if holds else not_decided(left) if left else FAILS


def for_whole(holds: bool, left: Sequence[Cell]) -> str:
    """The verdict on a claim about all cells together, which any cell may change."""
    return not_decided(left) if left else HOLDS if holds else FAILS


def not_decided(left: Sequence[Cell]) -> str:
    """The verdict "not decided", with the names of the missing cells."""
    names = [_name(cell) for cell in left[:NAMED]]
    more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
    return f"{NOT_DECIDED}: no tuned {'; '.join(names)}{more}"


def together(number: int, claim: str, findings: Sequence[Finding]) -> Finding:
    """The verdict on a hypothesis: it fails if one part fails, and holds if all parts hold."""
    verdicts = [finding.verdict for finding in findings if finding.verdict]
    open_in = [f.scope for f in findings if f.verdict.startswith(NOT_DECIDED)]
    if FAILS in verdicts:
        verdict = FAILS
    elif open_in or not verdicts:
        verdict = f"{NOT_DECIDED}: {', '.join(dict.fromkeys(open_in)) or 'nothing has run'}"
    else:
        verdict = HOLDS
    failing = [f.scope for f in findings if f.verdict == FAILS]
    detail = f"fails in {', '.join(dict.fromkeys(failing))}" if failing else ""
    return Finding(number, EVERYTHING, claim, detail=detail, verdict=verdict)


def _key(cell: Cell) -> tuple[str, str, int]:
    return cell.task, cell.method, cell.r


def _name(cell: Cell) -> str:
    title = METHODS[cell.method].title
    return title if cell.r == RANK else f"{title} at r = {cell.r}"
