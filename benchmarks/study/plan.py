"""Which runs the study makes: parts of cells, and the rates and seeds of a cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.study.methods import ABLATIONS, CORE, FULL, METHODS, RANK, RIVALS
from benchmarks.study.store import Shard

RATES = 6  # of the first grid
FINALISTS = 3  # rates that get all seeds
SEEDS = (0, 1, 2)
FRESH_SEEDS = (3, 4, 5, 6, 7)  # of the part "confirmation"; not used to choose rates
EXTENSIONS = 4  # additional rates at most, on either side
# η·κ at the best rate of the pilot (LoRA on the code task, one seed): where the grids begin.
CENTER = 3e-4
BELOW = 3  # rates of the first grid below the center; two are above it


@dataclass(frozen=True)
class Cell:
    """One method on one task at one rank."""

    task: str
    method: str
    r: int = RANK

    @property
    def title(self) -> str:
        return f"{self.task}: {METHODS[self.method].title}, r = {self.r}"


def _cells(task: str, methods: list[str], *ranks: int) -> list[Cell]:
    return [Cell(task, method, r) for r in ranks or (RANK,) for method in methods]


_OF_RANKS = ["lora", "loram", "pissa", "rslora", "lora_alpha"]
_CONFIRMED = ["lora", "loram", "pissa", "rslora", "loram_rslora", "lora_alpha", FULL]
# The parts that need tuned cells: with rates between those of the grid, and with fresh seeds.
REFINEMENT, CONFIRMATION = "refinement", "confirmation"
# In the order in which they run. If time runs out, the last parts are given up.
PARTS: dict[str, list[Cell]] = {
    "main": _cells("code", CORE) + _cells("sentiment", CORE),
    REFINEMENT: _cells("sentiment", [*CORE, *RIVALS, *ABLATIONS]),
    CONFIRMATION: _cells("code", _CONFIRMED) + _cells("sentiment", [*_CONFIRMED, "lora_ga"]),
    "rivals": _cells("code", RIVALS) + _cells("sentiment", RIVALS),
    "digits": _cells("digits", [*_OF_RANKS, "loram_rslora", FULL]),
    "ranks": _cells("code", _OF_RANKS, 8, 64) + _cells("sentiment", _OF_RANKS, 8, 64),
    "ablations": _cells("code", ABLATIONS) + _cells("sentiment", ABLATIONS),
}

TASK_NAMES = tuple(dict.fromkeys(cell.task for cells in PARTS.values() for cell in cells))


def work_of(
    parts: Sequence[str], shard: Shard, tasks: Sequence[str] = TASK_NAMES
) -> list[tuple[str, Cell]]:
    """The cells of these parts and tasks in a shard (every n-th cell), each with its part."""
    work = [(part, cell) for part in parts for cell in PARTS[part] if cell.task in tasks]
    return work[shard.index - 1 :: shard.count]


def rate(k: float) -> float:
    """10^(k/2), rounded to three digits as in the files. The k of a grid are integers; those of the
    refinement lie halfway between integers.
    """
    return float(f"{10 ** (k / 2):.2e}")


def rate_index(lr: float) -> float:
    """The k of a rate, a multiple of ½."""
    return round(4 * math.log10(lr)) / 2


def first_rates(step_size: float) -> list[int]:
    """Six k around the rate at which a step changes W by as much as at the pilot's best rate."""
    center = round(2 * math.log10(CENTER / step_size))
    return list(range(center - BELOW, center - BELOW + RATES))


def next_rate(losses: Mapping[float, float], first: list[int]) -> float | None:
    """The k of the next run of the first seed: the first grid, then further rates past the end of
    the grid that has the best loss. None if the best loss is inside the grid, or after `EXTENSIONS`
    rates past that end.

    `losses` has the final loss of each k that has run, infinite if it diverged.
    """
    for k in first:
        if k not in losses:
            return k
    low, high = min(losses), max(losses)
    best = best_rate(losses)
    if best == low and low > first[0] - EXTENSIONS:
        return low - 1
    if best == high and high < first[-1] + EXTENSIONS:
        return high + 1
    return None


def best_rate(losses: Mapping[float, float]) -> float:
    """The k of the smallest loss; the smaller of two equal ones."""
    return min(losses, key=lambda k: (losses[k], k))


def finalists(losses: Mapping[float, float]) -> list[float]:
    """The k of the three smallest losses; diverged runs are left out."""
    ranked = sorted((loss, k) for k, loss in losses.items() if math.isfinite(loss))
    return sorted(k for _, k in ranked[:FINALISTS])


def mean_losses(by_seed: Sequence[Mapping[float, float]]) -> dict[float, float]:
    """The mean final loss of each k that has run with every seed and has not diverged."""
    common = set.intersection(*(set(losses) for losses in by_seed))
    means = {k: math.fsum(own[k] for own in by_seed) / len(by_seed) for k in sorted(common)}
    return {k: mean for k, mean in means.items() if math.isfinite(mean)}


def between(means: Mapping[float, float]) -> list[float]:
    """The two k of the refinement, on either side of the best k of the grid."""
    best = best_rate({k: mean for k, mean in means.items() if k == round(k)})
    return [best - 0.5, best + 0.5]
