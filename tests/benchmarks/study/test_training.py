"""Runs on a tiny task: deterministic, independent of their order, resumable."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.study import check, plan, running
from benchmarks.study.methods import FULL, METHODS
from benchmarks.study.plan import Cell
from benchmarks.study.running import OutOfTimeError, Runner
from benchmarks.study.store import RunKey, Store, read_curves, read_runs
from benchmarks.study.tasks.base import Task
from benchmarks.study.training import Started, schedule

from ...support.exhaustive import EXHAUSTIVE, thinned


class Tiny(Task):
    """A two-layer network learns another one's function."""

    name, metric = "tiny", "minus the loss"
    steps, batch, checks = 6, 8, 2

    def __init__(self, device: torch.device) -> None:
        self.device = device
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 20)).to(device)
        other = nn.Linear(24, 20)
        with torch.no_grad():
            for parameter in [*self.model.parameters(), *other.parameters()]:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.model.requires_grad_(False).eval()
        self.targets = ["0", "2"]
        inputs = torch.randn(64, 24, generator=generator)
        self.data = list(zip(inputs, other(inputs).detach(), strict=True))

    def samples(self) -> list[tuple[Tensor, Tensor]]:
        return self.data[16:]

    def collate(self, samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        inputs, outputs = zip(*samples, strict=True)
        return torch.stack(inputs), torch.stack(outputs)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, outputs = batch
        return (model(inputs) - outputs).square().mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        loss = self.loss(model, self.collate(self.data[:16])).item()
        return loss, -loss


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(running.TASKS, "tiny", Tiny)
    monkeypatch.setattr(check, "CHECKED", [Cell("tiny", "loram", 4)])
    yield


# The others begin from another model.
AT_THE_BASE = [m for m in METHODS if m not in ("init_ab_plus", "lora_one")]


def runner(folder: Path, seen: list | None = None, **options) -> tuple[Runner, Store]:
    store = Store(folder)
    report = (lambda run: None) if seen is None else seen.append
    return Runner(store, torch.device("cpu"), report, **options), store


@pytest.mark.parametrize("method", thinned(METHODS))
def test_every_method_trains_from_the_same_start_at_every_rate(method: str) -> None:
    started = Started(Tiny(torch.device("cpu")), method, 4, 0)
    first = started.run(1e-3)
    other = started.run(1e-2)
    again = Started(Tiny(torch.device("cpu")), method, 4, 0).run(1e-3)
    assert first.points[1:] == again.points[1:]
    assert first.points[-1].nu_update != other.points[-1].nu_update
    assert [point.step for point in first.points] == [0, 3, 6]
    assert started.step_size > 0 and started.nu_weight > 0


@pytest.mark.parametrize("method", thinned(AT_THE_BASE))
def test_training_begins_as_the_untouched_model(method: str) -> None:
    task = Tiny(torch.device("cpu"))
    started = Started(task, method, 4, 0)
    assert started.first.loss == pytest.approx(task.evaluate(task.model)[0], rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "loram", "init_ab", "lora_xs", "lora_plus", FULL])
def test_one_step_changes_w_by_the_rate_times_kappa(method: str) -> None:
    """Entries of trained factors move by ± the rate in Adam's first step; signs of a gradient are
    not independent, so the magnitude is within a small factor, and exact for full fine-tuning.
    """
    task = Tiny(torch.device("cpu"))
    task.steps, task.checks = 1, 1
    lr = 1e-5
    started = Started(task, method, 4, 0)
    outcome = started.run(lr)
    ratio = math.sqrt(outcome.points[-1].nu_update) / (lr * started.step_size)
    assert ratio == pytest.approx(1, rel=1e-3) if method == FULL else 0.3 < ratio < 3


def test_the_rate_rises_and_falls_to_zero() -> None:
    values = [schedule(step, 24) for step in range(1, 25)]
    assert values[:3] == [0.5, 1.0, 22 / 23] and values[-1] == pytest.approx(1 / 23)
    assert max(values) == 1.0 and min(values) > 0


def test_a_run_that_diverges_stops() -> None:
    outcome = Started(Tiny(torch.device("cpu")), "lora", 4, 0).run(1e3)
    assert outcome.diverged and outcome.points[-1].step < 6


@pytest.mark.skipif(not EXHAUSTIVE, reason="trains sixty small models")
def test_a_killed_study_goes_on_and_writes_the_same_rows(tmp_path: Path) -> None:
    parts = ("main", plan.REFINEMENT, plan.CONFIRMATION)
    work = [(part, Cell("tiny", "loram", 4)) for part in parts]
    whole, _ = runner(tmp_path / "whole")
    whole.run(work)
    expected = read_runs(tmp_path / "whole")
    assert len(expected) >= plan.RATES + 2 * plan.FINALISTS + 2 * 3 + len(plan.FRESH_SEEDS)

    seen: list = []

    class KilledError(Exception):
        pass

    def report(run: object) -> None:
        seen.append(run)
        if len(seen) % 9 == 0:
            raise KilledError

    for _ in range(20):
        store = Store(tmp_path / "pieces")
        try:
            Runner(store, torch.device("cpu"), report).run(work)
        except KilledError:
            continue
        break
    timed = ("start_seconds", "start_mib", "seconds")
    numbers = [{k: v for k, v in row.items() if k not in timed} for row in expected]
    assert [
        {k: v for k, v in row.items() if k not in timed} for row in read_runs(tmp_path / "pieces")
    ] == numbers
    assert read_curves(tmp_path / "pieces") == read_curves(tmp_path / "whole")
    assert len(seen) == len(expected)  # nothing was run twice


def test_no_run_begins_after_the_deadline(tmp_path: Path) -> None:
    late, store = runner(tmp_path, deadline=0.0)
    with pytest.raises(OutOfTimeError):
        late.run([("main", Cell("tiny", "lora", 4))])
    assert not store.finished


def test_there_is_nothing_to_check_at_first(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), record=True)
    assert check.check(tmp_path, torch.device("cpu"), console)
    assert "No published run" in console.export_text()


def test_the_check_finds_a_changed_digit(tmp_path: Path) -> None:
    made, _ = runner(tmp_path)
    made.run([("main", Cell("tiny", "loram", 4))])
    console = Console(width=200, record=True, file=io.StringIO())
    assert check.check(tmp_path, torch.device("cpu"), console)
    assert "equal to the last digit" in console.export_text()

    best = min(
        (row for row in read_runs(tmp_path) if row["seed"] == "0"), key=lambda r: float(r["loss"])
    )
    text = (tmp_path / "runs.csv").read_text()
    changed = f"{float(best['loss']) * (1 + 1e-8):.9g}"
    assert changed != best["loss"]
    (tmp_path / "runs.csv").write_text(text.replace(best["loss"], changed))
    assert not check.check(tmp_path, torch.device("cpu"), console)

    # On another processor the same difference is shown, and is no failure.
    (tmp_path / "runs.csv").write_text(
        text.replace(best["loss"], changed).replace(best["torch_kernels"], "AVX9")
    )
    assert check.check(tmp_path, torch.device("cpu"), console)


def test_keys_are_what_the_rows_say() -> None:
    row = {"task": "code", "method": "lora", "r": "16", "seed": "2", "lr": "1.00e-03"}
    assert RunKey.of(row) == ("code", "lora", 16, 2, "1.00e-03")
