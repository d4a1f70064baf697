"""The report of the study, on made-up runs whose answers are known in closed form."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest

for package in ("rich", "matplotlib", "scipy"):
    pytest.importorskip(package, reason="the benchmarks need what `make test` installs")

from rich.console import Console  # noqa: E402
from scipy import stats  # noqa: E402

from benchmarks.common.document import put_tables  # noqa: E402
from benchmarks.study.methods import FULL, METHODS  # noqa: E402
from benchmarks.study.plan import (  # noqa: E402
    FRESH_SEEDS,
    SEEDS,
    Cell,
    finalists,
    first_rates,
    next_rate,
    rate,
)
from benchmarks.study.report import statistics, write_report  # noqa: E402
from benchmarks.study.report.__main__ import main  # noqa: E402
from benchmarks.study.report.cells import PLANNED, Study  # noqa: E402
from benchmarks.study.report.figures import FIGURES  # noqa: E402
from benchmarks.study.report.hypotheses import findings  # noqa: E402
from benchmarks.study.report.methods import confirmation_rows, method_rows  # noqa: E402
from benchmarks.study.report.rates import interpolated_rate, rate_rows, step_summaries  # noqa: E402
from benchmarks.study.report.tables import NOTHING, tables  # noqa: E402
from benchmarks.study.store import CURVE_COLUMNS, RUN_COLUMNS, rate_name, write_rows  # noqa: E402

BEST = 2e-4  # η·κ of the smallest loss in these studies
BOWL = 0.1  # how much of the loss a decade off the best rate adds
NOISE = (1.0, 1.01, 0.98)  # of the seeds, the same for all methods


def step_size(cell: Cell) -> float:
    """A κ for each method: that of LoRA grows with √r, those of s ∝ 1/√r do not depend on r."""
    if cell.method == "lora":
        return 0.09 * math.sqrt(cell.r / 16)
    return {"rslora": 0.35, "lora_alpha": 5.0, FULL: 1.0, "lora_sb": 0.2}.get(cell.method, 1.06)


def bowl(cell: Cell, k: int, seed: int) -> float:
    """A loss that depends on nothing but η·κ and the seed."""
    off = math.log10(step_size(cell) / BEST) + k / 2
    return 2.0 * NOISE[seed % 3] * (1 + BOWL * off**2)


def run(cell: Cell, k: int, seed: int, loss: float, **changes: object) -> dict[str, str]:
    kappa = step_size(cell)
    row = {
        "task": cell.task,
        "method": cell.method,
        "r": cell.r,
        "seed": seed,
        "lr": rate_name(rate(k)),
        "status": "done" if math.isfinite(loss) else "diverged",
        "steps": 24,
        "start_loss": 3.0,
        "loss": loss if math.isfinite(loss) else "",
        "best_loss": loss,
        "start_metric": 0.1,
        "metric": 0.5 + 0.1 * seed,
        "nu_weight": 0.04,
        "nu_update": (10 * kappa * 10 ** (k / 2)) ** 2,
        "scaling": 1.0,
        "step_size": kappa,
        "start_seconds": [0.5, 9.0, 0.7][seed % 3],
        "start_mib": 26,
    } | changes
    return {name: str(row.get(name, "")) for name in RUN_COLUMNS}


def curve(row: dict[str, str]) -> list[dict[str, str]]:
    """From 3 in a straight line to the final loss, with four points."""
    loss = float(row["loss"] or "inf")
    points = []
    for part in range(4):
        here = 3.0 + (loss - 3.0) * part / 3 if math.isfinite(loss) else math.nan
        text = "" if math.isnan(here) else str(here)
        points.append({name: row[name] for name in CURVE_COLUMNS if name in row})
        points[-1] |= {"step": str(8 * part), "loss": text, "train_loss": ""}
    return points


def runs_of(cell: Cell, loss=bowl, **changes: object) -> list[dict[str, str]]:
    """The whole cell: its grid, extended as the plan says, then all seeds of its best rates."""
    first, losses = first_rates(step_size(cell)), {}
    while (k := next_rate(losses, first)) is not None:
        losses[k] = loss(cell, k, 0)
    runs = [(k, 0) for k in losses] + [(k, s) for s in SEEDS[1:] for k in finalists(losses)]
    return [run(cell, k, seed, loss(cell, k, seed), **changes) for k, seed in runs]


def study_of(*groups: list[dict[str, str]]) -> Study:
    rows = [row for group in groups for row in group]
    return Study(rows, [point for row in rows for point in curve(row)])


def scaled(*factors: float):
    """The bowl times one factor for each seed."""
    return lambda cell, k, seed: factors[seed % len(factors)] * bowl(cell, k, seed)


LORA = Cell("code", "lora")
LORAM = Cell("code", "loram")


# --- statistics


def test_a_paired_difference_is_the_paired_t_test():
    losses, reference = [1.93, 2.05, 1.88], [2.0, 2.02, 1.97]
    percent = 100 * np.array(losses) / np.array(reference)
    oracle = stats.ttest_rel(percent, np.full(3, 100.0))
    found = statistics.paired_difference(losses, reference)
    interval = oracle.confidence_interval(0.95)
    assert found.mean == pytest.approx(percent.mean() - 100, rel=1e-12)
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-10)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-10)


def test_differences_without_any_spread():
    assert statistics.paired_difference([2.0, 4.0], [2.0, 4.0]) == (0, 0, 0, 1)
    assert statistics.paired_difference([1.5, 3.0], [2.0, 4.0]) == (-25, -25, -25, 0)


@pytest.mark.parametrize("pairs", [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([], [])])
def test_a_difference_needs_two_pairs(pairs):
    with pytest.raises(ValueError, match="at least two pairs"):
        statistics.paired_difference(*pairs)


def test_holm_by_hand():
    # 4 · 0.005, 3 · 0.01, 2 · 0.03, and 0.04, which may not be below the one before.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@pytest.mark.parametrize(
    ("losses", "width"),
    [
        ({-4: 1.05, -3.5: 1.0, -3: 1.02}, (0.1 + 0.25, False, False)),
        ({-4: 1.005, -3.5: 1.0, -3: 1.02}, (0.5 + 0.25, True, False)),
        ({-4: 1.0, -3.5: 1.005}, (0.5, True, True)),
        ({-4: 1.02, -3.5: 1.0, -3: math.inf}, (0.25, False, False)),
        ({-4: 1.005, -3.5: 1.02, -3: 1.0, -2.5: 1.02}, (0.25 + 0.25, False, False)),  # one valley
    ],
)
def test_width(losses, width):
    assert statistics.width_near_best(losses) == (pytest.approx(width[0]), *width[1:])


def test_no_width_without_a_loss():
    with pytest.raises(ValueError, match="finite"):
        statistics.width_near_best({-4: math.inf})


def test_vertex():
    parabola = [(x, 2 + 3 * (x - 0.3) ** 2) for x in (0.0, 0.5, 1.2)]
    assert statistics.vertex(parabola) == pytest.approx(0.3)
    assert statistics.vertex([(0, 1.0), (1, 2.0), (2, 3.0)]) is None  # lowest at an end
    assert statistics.vertex([(0, 2.0), (1, 1.0), (2, math.inf)]) is None
    assert statistics.vertex([(0, 1.0), (1, 1.0), (2, 1.0)]) is None
    assert statistics.vertex([(0, 1.0), (1, 1.0), (2, 3.0)]) == pytest.approx(0.5)


def test_first_reaching():
    points = [(0, 3.0), (8, 2.0), (16, 2.5), (24, 1.5)]
    assert statistics.first_reaching(points, 2.25) == 6
    assert statistics.first_reaching(points, 1.75) == 22
    assert statistics.first_reaching(points, 3.5) == 0
    assert statistics.first_reaching(points, 1.0) is None
    assert statistics.first_reaching([], 1.0) is None


def test_spread_covers_nine_of_ten():
    assert statistics.geometric_mean([0.1, 10.0, 8.0]) == pytest.approx(2.0)
    assert statistics.spread([5 / 3, 15.0]) == pytest.approx(3.0)
    assert statistics.spread([1.0] * 19 + [100.0, 0.01]) == pytest.approx(1.0)


def test_fit_is_least_squares():
    x = np.linspace(-3, 1, 20)
    y = 1 + x - x**3 + np.cos(9 * x)
    found = statistics.fit(x, y)
    residual = y - np.polyval(np.polyfit(x, y, 3), x)
    assert found.r_squared == pytest.approx(1 - residual.var() / y.var())
    assert statistics.fit(x, 1 + x - x**3).r_squared == pytest.approx(1)
    with pytest.raises(ValueError, match="abscissas"):
        statistics.fit([0, 1, 2, 3], [1, 2, 3, 4])


# --- which cells are finished, and their best rates


def test_a_cell_is_finished_when_its_finalists_have_all_seeds():
    rows = runs_of(LORA)
    own = study_of(rows).get("code", "lora")
    off = {k: abs(math.log10(step_size(LORA) / BEST) + k / 2) for k in own.first}
    assert own.best == min(off, key=lambda k: off[k])
    assert own.mean_at_best("loss") == pytest.approx(
        np.mean([bowl(LORA, own.best, s) for s in SEEDS])
    )
    for missing in range(len(rows)):
        assert study_of(rows[:missing] + rows[missing + 1 :]).get("code", "lora") is None


def test_the_best_has_the_smallest_mean_not_the_first_seed():
    first = first_rates(step_size(LORA))

    def loss(cell, k, seed):
        bonus = {first[2]: (0.0, 0.0, 0.0), first[3]: (0.1, -0.4, -0.4), first[4]: (0.2, 0, 0)}
        return 2.0 + bonus.get(k, (0.5, 0.0, 0.0))[seed]

    own = study_of(runs_of(LORA, loss)).get("code", "lora")
    assert own.best == first[3]
    assert min(own.first, key=own.first.get) == first[2]


def test_a_grid_whose_best_is_at_its_end_goes_on():
    first = first_rates(step_size(LORA))

    def falling(cell, k, seed):
        return 3.0 - 0.1 * (k - first[0])

    rows = [run(LORA, k, 0, falling(LORA, k, 0)) for k in first]
    rows += [run(LORA, k, seed, falling(LORA, k, seed)) for seed in SEEDS[1:] for k in first[3:]]
    assert study_of(rows).unfinished  # the best is the last rate: one more is needed
    for k in range(first[-1] + 1, first[-1] + 5):
        rows += [run(LORA, k, 0, falling(LORA, k, 0))]
    assert study_of(rows).unfinished  # four more are the end, but the finalists are others now
    for k in range(first[-1] + 2, first[-1] + 5):
        rows += [run(LORA, k, seed, falling(LORA, k, seed)) for seed in SEEDS[1:]]
    study = study_of(rows)
    own = study.get("code", "lora")
    assert own.best == first[-1] + 4
    assert own.at_grid_end
    (row,) = method_rows(study)
    assert (row["at_grid_end"], row["width_clipped"]) == ("yes", "high")
    assert interpolated_rate(own) is None
    assert "†" in tables(study)["code"]
    assert "≥" in tables(study)["code"]


def test_a_rate_that_diverges_with_one_seed_is_not_the_best():
    def loss(cell, k, seed):
        at_best = k == round(2 * math.log10(BEST / step_size(cell)))
        return math.inf if at_best and seed == 1 else bowl(cell, k, seed)

    study = study_of(runs_of(LORA, loss))
    own = study.get("code", "lora")
    assert own.best != round(2 * math.log10(BEST / step_size(LORA)))
    assert method_rows(study)[0]["diverged"] == 1


def test_a_cell_that_always_diverges_has_a_row_without_numbers():
    def loss(cell, k, seed):
        return math.inf if seed == 2 else bowl(cell, k, seed)

    study = study_of(runs_of(LORA), runs_of(LORAM, loss))
    assert study.get("code", "loram") is None
    assert not study.unfinished
    row = method_rows(study)[1]
    assert (row["verdict"], row["diverged"], "loss" in row) == ("diverged", 3, False)
    assert "| LoRAM | 1 |  |  |  | diverged |" in tables(study)["code"]
    assert [row["method"] for row in rate_rows(study)] == ["lora"]


def test_an_unknown_method_is_an_error():
    row = run(LORA, -7, 0, 2.0, method="lorum")
    with pytest.raises(ValueError, match=r"unknown method 'lorum'.*did you mean"):
        Study([row])


# --- methods.csv


def test_a_row_of_methods():
    factors = (0.97, 0.96, 0.98)
    study = study_of(runs_of(LORA), runs_of(LORAM, scaled(*factors)))
    lora, loram = method_rows(study)
    reference, own = study.get("code", "lora"), study.get("code", "loram")
    losses = [factors[s] * bowl(LORAM, own.best, s) for s in SEEDS]
    references = [bowl(LORA, reference.best, s) for s in SEEDS]
    oracle = stats.ttest_rel(np.array(losses) / references, np.ones(3))
    assert loram["difference_percent"] == pytest.approx(
        100 * np.mean(np.array(losses) / references) - 100
    )
    assert loram["p"] == loram["p_holm"] == pytest.approx(oracle.pvalue)
    assert loram["verdict"] == ("better" if oracle.pvalue < 0.05 else "no clear difference")
    assert (loram["metric"], loram["start_seconds"], loram["seeds"]) == (pytest.approx(0.6), 0.7, 3)
    assert loram["relative_update"] == pytest.approx(
        10 * step_size(LORAM) * 10 ** (own.best / 2) / 0.2
    )
    assert lora["verdict"] == "" and "difference_percent" not in lora
    assert lora["steps_to_lora"] == pytest.approx(24)
    wanted = 24 * (3 - np.mean(references)) / (3 - np.mean(losses))
    assert loram["steps_to_lora"] == pytest.approx(wanted)


def test_a_method_that_never_reaches_lora():
    row = method_rows(study_of(runs_of(LORA), runs_of(LORAM, scaled(1.2))))[1]
    assert (row["steps_to_lora"], row["verdict"]) == ("never", "worse")


def test_no_reference_no_difference():
    (row,) = method_rows(study_of(runs_of(LORAM)))
    assert row["verdict"] == "no reference"
    assert "p" not in row and row["steps_to_lora"] == ""


def test_holm_is_over_a_task_at_one_rank_and_over_the_other_ranks():
    names = ("lora", "loram", "pissa", "rslora")
    cells = [
        Cell(task, name, r) for task in ("code", "sentiment") for r in (16, 8) for name in names
    ]
    noisy = {
        name: scaled(1 + 0.01 * i, 1 + 0.012 * i, 1 + 0.016 * i) for i, name in enumerate(names)
    }
    rows = method_rows(study_of(*(runs_of(cell, noisy[cell.method]) for cell in cells)))
    for family in (("code", (16,)), ("sentiment", (16,)), (("code", "sentiment"), (8,))):
        own = [r for r in rows if r["task"] in family[0] and r["r"] in family[1] and "p" in r]
        assert len(own) == (3 if family[1] == (16,) else 6)
        assert [r["p_holm"] for r in own] == pytest.approx(statistics.holm([r["p"] for r in own]))


def test_an_unfinished_method_is_no_comparison():
    unfinished = runs_of(Cell("code", "pissa"))[:-1]
    study = study_of(runs_of(LORA), runs_of(LORAM, scaled(0.97, 0.96, 0.98)), unfinished)
    assert [row["method"] for row in method_rows(study)] == ["lora", "loram"]
    loram = method_rows(study)[1]
    assert loram["p"] == loram["p_holm"]
    assert [own.cell.method for own in study.unfinished] == ["pissa"]


# --- rates.csv


def test_predicted_rates():
    study = study_of(runs_of(LORA), runs_of(LORAM))
    lora, loram = rate_rows(study)
    best = study.get("code", "lora").best
    assert lora["ratio"] == lora["interpolated_ratio"] == 1
    assert loram["predicted_rate"] == pytest.approx(rate(best) * 0.09 / 1.06)
    assert loram["ratio"] == pytest.approx(float(loram["rate"]) / loram["predicted_rate"])
    for row in (lora, loram):  # the bowl is a parabola, so that the vertex is exact
        assert row["interpolated_times_step_size"] == pytest.approx(BEST, rel=1e-9)
    assert loram["interpolated_ratio"] == pytest.approx(1)
    (summary,) = step_summaries([lora, loram])
    both = [row["rate_times_step_size"] for row in (lora, loram)]
    assert summary["c"] == pytest.approx(math.sqrt(both[0] * both[1]))
    assert summary["f"] == pytest.approx(math.sqrt(max(both) / min(both)))
    assert summary["interpolated f"] == pytest.approx(1)


def test_between_the_rates_of_the_first_seed_where_means_are_missing():
    """The finalists are not three neighbors, so that the parabola is that of the first seed."""
    first = first_rates(step_size(LORA))

    def loss(cell, k, seed):
        losses = dict(zip(first, (3.0, 2.0, 2.8, 2.1, 2.6, 3.0), strict=True))
        return losses[k] * NOISE[seed % 3]

    own = study_of(runs_of(LORA, loss)).get("code", "lora")
    wanted = statistics.vertex([(first[0] / 2, 3.0), (first[1] / 2, 2.0), (first[2] / 2, 2.8)])
    assert interpolated_rate(own) == pytest.approx(10**wanted)


def test_no_prediction_without_lora():
    (row,) = rate_rows(study_of(runs_of(LORAM)))
    assert "ratio" not in row and "interpolated_ratio" not in row


# --- hypotheses


@pytest.fixture(scope="module")
def whole() -> dict[Cell, list[dict[str, str]]]:
    """Every planned cell, the losses of all of them in one bowl of η·κ."""
    return {cell: runs_of(cell) for cell in PLANNED}


def verdicts(cells, task=None) -> dict[int, list[str]]:
    study = study_of(*cells.values())
    found = findings(study)
    return {
        n: [
            f.verdict
            for f in found
            if f.hypothesis == n and f.scope == (task or "all") and f.verdict
        ]
        for n in range(1, 6)
    }


def test_all_hypotheses_hold_in_one_bowl(whole):
    assert verdicts(whole) == {n: ["holds"] for n in range(1, 6)}
    slopes = {
        f.quantity.rpartition(", ")[2]: f.value
        for f in findings(study_of(*whole.values()))
        if f.hypothesis == 5 and f.scope == "code"
    }
    assert slopes["RsLoRA"] == pytest.approx(0, abs=1e-6)
    assert slopes["LoRA (B = 0)"] == pytest.approx(-0.5)


def test_nothing_is_decided_by_nothing():
    for verdict in verdicts({}).values():
        assert verdict[0].startswith("not decided")


def test_a_start_that_is_much_better_is_enough(whole):
    cells = {LORA: whole[LORA], LORAM: runs_of(LORAM, scaled(0.97, 0.96, 0.98))}
    assert verdicts(cells, "code")[1] == ["fails"]
    ceiling = Cell("code", FULL)  # full fine-tuning, R alone: no claim about them
    only_r = Cell("code", "lora_sb")
    better = {cell: runs_of(cell, scaled(0.9)) for cell in (ceiling, only_r)}
    assert verdicts(whole | better)[1] == ["holds"]


def test_a_rate_outside_the_band(whole):
    def shifted(cell, k, seed):
        return bowl(cell, k - 2, seed)  # the best is a decade above the predicted rate

    cell = Cell("sentiment", "olora")
    found = verdicts(whole | {cell: runs_of(cell, shifted)})
    assert found[2] == ["fails"]
    assert verdicts(whole | {cell: runs_of(cell, shifted)}, "code")[2] == ["holds", "holds"]


def test_losses_that_the_rate_decides_are_on_no_curve_of_magnitude(whole):
    def by_rate(cell, k, seed):
        return 2.0 * NOISE[seed % 3] * (1 + 0.02 * (k / 2 + 3.5) ** 2)

    cells = {c: runs_of(c, by_rate) if c.task == "code" and c.r == 16 else whole[c] for c in whole}
    found = verdicts(cells, "code")
    assert found[3] == ["fails"]
    assert found[2][1] == "fails"  # the best rate is the same for all


def test_missing_cells_are_named(whole):
    cells = {c: rows for c, rows in whole.items() if c != Cell("code", "pissa")}
    found = verdicts(cells, "code")
    assert found[4][0] == "not decided: no tuned PiSSA"
    assert found[3] == ["not decided: no tuned PiSSA"]
    assert verdicts(cells)[4] == ["not decided: code"]
    assert verdicts(cells, "sentiment")[4] == ["holds", "holds"]


def test_loram_apart_from_pissa_and_from_an_ablation(whole):
    pissa = Cell("code", "pissa")
    assert verdicts(whole | {pissa: runs_of(pissa, scaled(1.006))}, "code")[4][0] == "fails"
    assert verdicts(whole | {pissa: runs_of(pissa, scaled(1.004))}, "code")[4][0] == "holds"
    exact = Cell("code", "loram_exact")
    assert verdicts(whole | {exact: runs_of(exact, scaled(0.99))}, "code")[4] == ["holds", "fails"]


def test_a_best_rate_that_moves_with_the_rank(whole):
    def moving(cell, k, seed):
        off = math.log10(step_size(cell) / BEST) + k / 2 + 0.5 * math.log10(cell.r / 16)
        return 2.0 * NOISE[seed % 3] * (1 + BOWL * off**2)

    cells = {
        Cell("code", "rslora", r): runs_of(Cell("code", "rslora", r), moving) for r in (8, 16, 64)
    }
    assert verdicts(whole | cells, "code")[5][0] == "fails"


# --- tables and figures


def write(folder, *groups) -> Console:
    rows = [row for group in groups for row in group]
    write_rows(folder / "runs-1-of-2.csv", RUN_COLUMNS, rows)
    points = [point for row in rows for point in curve(row)]
    write_rows(folder / "curves-1-of-2.csv", CURVE_COLUMNS, points)
    return Console(file=io.StringIO(), width=140)


def test_everything_is_written_beside_the_rows(tmp_path):
    unfinished = runs_of(Cell("code", "rslora"))[:3]
    console = write(tmp_path, runs_of(LORA), runs_of(LORAM, scaled(0.97)), unfinished)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_report(tmp_path, console)
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    made = {path.name for path in tmp_path.iterdir()} - set(before)
    assert made == {"methods.csv", "rates.csv", "hypotheses.csv", "table.md", *FIGURES}
    assert all(b"matplotlib" not in (tmp_path / name).read_bytes() for name in FIGURES)
    said = console.file.getvalue()
    assert "Unfinished: code: RsLoRA, r = 16 (3 runs)" in said
    assert said.index("Hypothesis 5") < said.index("geometric mean c")
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"<!-- table digits -->\n{NOTHING}\n<!-- end of table digits -->" in table
    assert "RsLoRA" not in table.partition("<!-- table hypotheses -->")[0]
    methods = (tmp_path / "methods.csv").read_text(encoding="utf-8").splitlines()
    assert len(methods) == 3


def test_only_unfinished_cells(tmp_path):
    console = write(tmp_path, runs_of(LORA)[:2])
    write_report(tmp_path, console)
    assert [name for name in FIGURES if (tmp_path / name).exists()] == ["loss_vs_rate.png"]
    assert len((tmp_path / "methods.csv").read_text(encoding="utf-8").splitlines()) == 1


def test_nothing_has_run(tmp_path):
    console = Console(file=io.StringIO())
    write_report(tmp_path, console)
    assert "Nothing has run" in console.file.getvalue()
    assert not list(tmp_path.iterdir())


def test_tables_go_between_their_markers(tmp_path):
    write(tmp_path, runs_of(LORA), runs_of(LORAM))
    document = tmp_path / "study.md"
    text = "# Study\n\n{}\n\nMiddle.\n\n{}\n\nEnd.\n"
    blocks = [f"<!-- table {n} -->\n{{}}<!-- end of table {n} -->" for n in ("code", "ranks")]
    document.write_text(text.format(*(block.format("") for block in blocks)), encoding="utf-8")
    assert main(["--out", str(tmp_path), "--into", str(document)]) == 0
    once = document.read_text(encoding="utf-8")
    assert once == text.format(
        blocks[0].format(tables(study_of(runs_of(LORA), runs_of(LORAM)))["code"] + "\n"),
        blocks[1].format(NOTHING + "\n"),
    )
    assert put_tables(document, tables(study_of(runs_of(LORA), runs_of(LORAM)))) == [
        "code",
        "ranks",
    ]
    assert document.read_text(encoding="utf-8") == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<!-- table cod -->\n<!-- end of table cod -->\n",
            "unknown table in study.md 'cod'.*'code'",
        ),
        ("<!-- table code -->\nabc\n", "'code' has no other end"),
        ("abc\n<!-- end of table code -->\n", "'code' has no other end"),
        ("<!-- table code -->\n<!-- end of table ranks -->\n", "has no other end"),
    ],
)
def test_markers_that_do_not_fit_leave_the_document_alone(tmp_path, text, message):
    document = tmp_path / "study.md"
    document.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        put_tables(document, tables(Study([])))
    assert document.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["study.md"]


def fresh_runs(cell: Cell, losses: list[float]) -> list[dict[str, str]]:
    """The part "confirmation" of a cell, with these final losses, at its best rate."""
    best = study_of(runs_of(cell)).get(cell.task, cell.method).best
    return [run(cell, best, seed, x) for seed, x in zip(FRESH_SEEDS, losses, strict=True)]


def test_the_confirmation_is_of_the_fresh_seeds_alone():
    lora, loram = [2.0, 2.1, 1.9, 2.0, 2.2], [1.98, 2.12, 1.85, 1.99, 2.15]
    tuned = [runs_of(LORA), runs_of(LORAM), runs_of(Cell("code", "pissa"))]
    study = study_of(*tuned, fresh_runs(LORA, lora), fresh_runs(LORAM, loram))
    first, second = confirmation_rows(study)  # PiSSA has not run with the fresh seeds
    percent = 100 * (np.array(loram) / np.array(lora) - 1)
    oracle = stats.ttest_1samp(percent, 0.0)
    interval = oracle.confidence_interval(0.95)
    assert first["loss"] == pytest.approx(np.mean(lora)) and first["verdict"] == ""
    assert second["difference_percent"] == pytest.approx(percent.mean())
    assert (second["low"], second["high"]) == pytest.approx((interval.low, interval.high))
    assert second["p_holm"] == pytest.approx(oracle.pvalue)
    assert "difference_from_pissa_percent" not in second
    # What the first seeds say is as it was.
    without = [dict(row, runs=0) for row in method_rows(study_of(*tuned))]
    assert [dict(row, runs=0) for row in method_rows(study)] == without


def test_a_confirmation_waits_for_all_fresh_seeds():
    some = fresh_runs(LORA, [2.0] * 5)[:-1]
    assert confirmation_rows(study_of(runs_of(LORA), some)) == []
    diverged = fresh_runs(LORA, [2.0, 2.0, math.inf, 2.0, 2.0])
    (row,) = confirmation_rows(study_of(runs_of(LORA), diverged))
    assert row["verdict"] == "1 of 5 diverged" and "loss" not in row


def test_every_table_has_as_many_cells_as_heads(whole):
    fresh = [fresh_runs(LORA, [2.0] * 5), fresh_runs(LORAM, [2.0, 2.0, 2.1, 2.0, 2.0])]
    for table in tables(study_of(*whole.values(), *fresh)).values():
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len(lines) > 2
        assert len({line.count("|") for line in lines}) == 1


def test_every_method_has_a_look_of_its_own():
    from benchmarks.study.report.figures.style import STYLES

    assert list(STYLES) and set(STYLES) == set(METHODS)
    assert len({(s.color, s.marker, s.is_open) for s in STYLES.values()}) == len(METHODS)
