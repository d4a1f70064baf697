"""Hypotheses 1 and 4: how far apart tuned losses are."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.study.methods import ABLATIONS, FULL, METHODS, RANK, REFERENCE
from benchmarks.study.report.cells import Study
from benchmarks.study.report.comparisons import compare, compare_with_lora, difference
from benchmarks.study.report.hypotheses.finding import (
    Finding,
    counted,
    for_all,
    missing,
    planned,
)

NEARLY_EQUAL = 2.0  # percent, hypothesis 1
EQUAL = 0.5  # percent, hypothesis 4
ONLY_R = ("lora_xs", "lora_sb")  # A and B do not train there
STARTS = [name for name in METHODS if name not in (FULL, *ONLY_R)]


def nearly_equal(study: Study, task: str) -> list[Finding]:
    """Hypothesis 1 on a task: no mean difference from LoRA is below -2 %.

    The rule covers all methods in which A and B train, including those that differ from LoRA in s
    or in B's rate. The result for the starts alone is shown for comparison.
    """
    alone = [m for m in STARTS if METHODS[m].scaling == "lora" and METHODS[m].ratio == 1]
    rule = _lowest(study, task, STARTS, "lowest difference from LoRA, %")
    beside = _lowest(study, task, alone, "the same among methods with LoRA's s and rates, %")
    return [rule, replace(beside, verdict="", bound="")]


def _lowest(study: Study, task: str, methods: list[str], quantity: str) -> Finding:
    cells = planned(task, methods)
    left = missing(study, cells)
    compared = [
        (found.difference.mean, cell, found)
        for cell, found in compare_with_lora(study).items()
        if cell in cells
    ]
    if not compared:
        value, detail = None, ""
    else:
        value, cell, found = min(compared, key=lambda item: item[0])
        ends = f"{found.difference.low:+.2f} to {found.difference.high:+.2f}"
        detail = f"{METHODS[cell.method].title}, 95 % interval {ends}, {found.verdict}"
    holds = value is None or value >= -NEARLY_EQUAL
    return Finding(
        *(1, task, quantity, value, f"≥ -{NEARLY_EQUAL:g}", detail),
        cells=counted(cells, left),
        verdict=for_all(holds, left),
    )


def as_pissa(study: Study, task: str) -> list[Finding]:
    """Hypothesis 4 on a task: LoRAM's mean difference from PiSSA is at most 0.5 % either way, and
    none of LoRAM's ablations is better or worse than LoRAM, adjusted over the ablations.
    """
    findings = [_loram_and_pissa(study, task, RANK)]
    findings += [
        _loram_and_pissa(study, task, r) for r in _other_ranks(task) if study.get(task, "loram", r)
    ]
    return findings + ([_ablations(study, task)] if planned(task, ABLATIONS) else [])


def _loram_and_pissa(study: Study, task: str, r: int) -> Finding:
    cells = planned(task, ("loram", "pissa"), (r,))
    left = missing(study, cells)
    loram, pissa = study.get(task, "loram", r), study.get(task, "pissa", r)
    value, detail = None, ""
    if loram is not None and pissa is not None:
        found = difference(loram, pissa)
        value = found.mean
        detail = f"95 % interval {found.low:+.2f} to {found.high:+.2f}"
    by_rule = r == RANK
    holds = value is None or abs(value) <= EQUAL
    return Finding(
        4,
        task if by_rule else f"{task}, r = {r}",
        "difference of LoRAM from PiSSA, %",
        value,
        f"within ± {EQUAL:g}" if by_rule else "",
        detail,
        counted(cells, left),
        for_all(holds, left) if by_rule else "",
    )


def _ablations(study: Study, task: str) -> Finding:
    cells = planned(task, [*ABLATIONS, "loram"])
    left = missing(study, cells)
    loram = study.get(task, "loram")
    tuned = [own for own in (study.get(task, name) for name in ABLATIONS) if own is not None]
    found = compare([(own, loram) for own in tuned]) if loram is not None else {}
    clear = [each for each in found.values() if each.verdict != "no clear difference"]
    largest = max(found, key=lambda c: abs(found[c].difference.mean), default=None)
    return Finding(
        4,
        task,
        "ablations that are better or worse than LoRAM",
        float(len(clear)) if found else None,
        "= 0",
        f"largest difference: {METHODS[largest.method].title}, "
        f"{found[largest].difference.mean:+.2f} %"
        if largest is not None
        else "",
        counted(cells, left),
        for_all(not clear, left),
    )


def _other_ranks(task: str) -> list[int]:
    return sorted({c.r for c in planned(task, (REFERENCE,), range(1 << 16)) if c.r != RANK})
