"""The rates and seeds of a cell, and the cells of a shard."""

from __future__ import annotations

import math

import pytest

from benchmarks.study.methods import METHODS, REFERENCE
from benchmarks.study.plan import (
    CENTER,
    EXTENSIONS,
    PARTS,
    RATES,
    SEEDS,
    TASK_NAMES,
    Cell,
    between,
    finalists,
    first_rates,
    mean_losses,
    next_rate,
    rate,
    rate_index,
    work_of,
)
from benchmarks.study.store import Shard
from benchmarks.study.tasks import TASKS


def run_all(loss, first: list[int]) -> dict[int, float]:
    """Make the runs of the first seed, where `loss` gives the final loss of a k."""
    losses: dict[int, float] = {}
    while (k := next_rate(losses, first)) is not None:
        assert k not in losses
        losses[k] = loss(k)
    return losses


def test_rates_are_half_a_decade_apart_and_have_three_digits() -> None:
    assert [rate(k) for k in (-8, -7, -6)] == [1e-4, 3.16e-4, 1e-3]
    assert all(rate_index(rate(k)) == k for k in range(-20, 3))


@pytest.mark.parametrize("step_size", [1e-3, 0.0884, 1.0, 30.0])
def test_the_first_grid_is_around_the_rate_that_moves_w_as_the_pilot(step_size: float) -> None:
    first = first_rates(step_size)
    assert len(first) == RATES and first == list(range(first[0], first[0] + RATES))
    assert abs(math.log10(rate(first[3]) * step_size / CENTER)) <= 0.25 + 1e-3


@pytest.mark.parametrize("best", range(-4, 10))
def test_the_grid_is_extended_until_the_best_is_inside(best: int) -> None:
    losses = run_all(lambda k: (k - best) ** 2 + 1.0, [0, 1, 2, 3, 4, 5])
    inside = -EXTENSIONS < best < 5 + EXTENSIONS
    assert (min(losses) < best < max(losses)) == inside
    assert len(losses) == RATES + {0: 1, 5: 1}.get(best, 0) if 0 <= best <= 5 else True


def test_the_grid_ends_after_the_extensions() -> None:
    assert sorted(run_all(lambda k: -k, [0, 1, 2, 3, 4, 5])) == list(range(6 + EXTENSIONS))


def test_all_diverged_asks_for_smaller_rates() -> None:
    losses = run_all(lambda k: math.inf, [0, 1, 2, 3, 4, 5])
    assert min(losses) == -EXTENSIONS
    assert finalists(losses) == []


def test_finalists_are_the_three_best_that_did_not_diverge() -> None:
    losses = {0: 3.0, 1: 1.0, 2: 0.5, 3: math.inf, 4: 2.0}
    assert finalists(losses) == [1, 2, 4]
    assert finalists({0: 1.0, 1: math.inf}) == [0]


def test_the_refinement_is_beside_the_best_of_the_grid() -> None:
    assert between({-6: 2.0, -5: 1.5, -4: 1.8}) == [-5.5, -4.5]
    assert between({-6: 2.0, -5.5: 1.4, -5: 1.5, -4: 1.8}) == [-5.5, -4.5]  # also when resumed
    assert [rate(k) for k in (-5.5, -4.5)] == [1.78e-3, 5.62e-3]
    assert [rate_index(rate(k / 2)) for k in range(-30, 3)] == [k / 2 for k in range(-30, 3)]


def test_means_are_of_rates_that_every_seed_has_finished() -> None:
    by_seed = [{0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: math.inf}, {0: 6.0, 1: 1.0, 2: 1.0}]
    assert mean_losses(by_seed) == {0: 3.0}
    assert mean_losses([{}, {0: 1.0}]) == {}


def test_the_shards_cover_every_cell_once() -> None:
    parts = list(PARTS)
    shards = [work_of(parts, Shard(i, 3)) for i in (1, 2, 3)]
    everything = work_of(parts, Shard())
    assert sorted(str(c) for shard in shards for c in shard) == sorted(map(str, everything))
    assert len(set(everything)) == len(everything)


def test_a_shard_of_one_task_has_its_cells_alone() -> None:
    assert sorted(TASK_NAMES) == sorted(TASKS)
    for task in TASK_NAMES:
        shards = [work_of(list(PARTS), Shard(i, 2), [task]) for i in (1, 2)]
        own = [(part, cell) for part, cell in work_of(list(PARTS), Shard()) if cell.task == task]
        assert own and sorted(map(str, own)) == sorted(str(c) for shard in shards for c in shard)


def test_every_method_has_a_main_cell_on_code_and_sentiment() -> None:
    cells = {cell for _, cell in work_of(list(PARTS), Shard())}
    assert all(Cell(task, method) in cells for task in ("code", "sentiment") for method in METHODS)
    assert Cell("digits", REFERENCE) in cells and len(SEEDS) >= 3


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", ""])
def test_a_wrong_shard_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="i/n"):
        Shard.parse(text)


@pytest.mark.parametrize("r", [8, 16, 64])
def test_the_scalings_are_those_of_the_design(r: int) -> None:
    expected = {"lora": 1.0, "rslora": 16 / r**0.5, "alpha_sqrt": 256 / r**0.5}
    for method in METHODS.values():
        if method.start is not None:
            config = method.config(r, 0, ["up_proj"])
            assert config.layer_scaling("up_proj") == pytest.approx(expected[method.scaling])
