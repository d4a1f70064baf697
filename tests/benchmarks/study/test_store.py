"""Rows survive a kill at any byte, and shards are read together."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study.store import (
    CURVE_COLUMNS,
    RUN_COLUMNS,
    RunKey,
    Shard,
    Store,
    merge,
    rate_name,
    read_curves,
    read_runs,
)


def rows(seed: int, lr: float = 1e-3) -> tuple[dict[str, str], list[dict[str, str]]]:
    key = {"task": "code", "method": "lora", "r": "16", "seed": str(seed), "lr": rate_name(lr)}
    run = dict.fromkeys(RUN_COLUMNS, "1") | key
    points = [dict.fromkeys(CURVE_COLUMNS, "2") | key | {"step": str(step)} for step in (0, 8)]
    return run, points


def test_rows_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in (2, 0, 1):
        store.add(*rows(seed))
    assert [row["seed"] for row in read_runs(tmp_path)] == ["0", "1", "2"]
    assert read_runs(tmp_path)[0] == rows(0)[0]
    assert [(p["seed"], p["step"]) for p in read_curves(tmp_path)] == [
        (seed, step) for seed in "012" for step in "08"
    ]
    assert set(Store(tmp_path).finished) == {
        RunKey("code", "lora", 16, s, "1.00e-03") for s in range(3)
    }


@pytest.mark.parametrize("name", ["runs.csv", "curves.csv"])
def test_a_kill_at_any_byte_loses_at_most_the_last_run(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    store.add(*rows(0))
    before = (tmp_path / name).stat().st_size
    store.add(*rows(1))
    whole = (tmp_path / name).read_bytes()
    for end in range(before, len(whole)):
        (tmp_path / name).write_bytes(whole[:end])
        if name == "curves.csv":  # points are written first: the run's row is not there yet
            runs = (tmp_path / "runs.csv").read_text().splitlines(keepends=True)
            (tmp_path / "runs.csv").write_text("".join(runs[:2]))
        again = Store(tmp_path)
        assert [key.seed for key in again.finished] == [0]
        again.add(*rows(1))
        assert len(read_runs(tmp_path)) == 2 and len(read_curves(tmp_path)) == 4
        assert (tmp_path / name).read_bytes() == whole


def test_shards_write_files_of_their_own_and_are_merged(tmp_path: Path) -> None:
    first, second = Store(tmp_path, Shard(1, 2)), Store(tmp_path, Shard(2, 2))
    first.add(*rows(0))
    second.add(*rows(1, 1e-2))
    second.add(*rows(1, 1e-4))
    assert len(first.finished) == 1
    first.refresh()
    assert len(first.finished) == 3
    assert len(Store(tmp_path, Shard(1, 2)).finished) == 3
    runs, curves = read_runs(tmp_path), read_curves(tmp_path)
    assert [row["lr"] for row in runs] == ["1.00e-03", "1.00e-04", "1.00e-02"]
    merge(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.csv", "runs.csv"]
    assert read_runs(tmp_path) == runs and read_curves(tmp_path) == curves


def test_other_columns_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("task,method\ncode,lora\n")
    with pytest.raises(ValueError, match=r"runs\.csv has other columns"):
        Store(tmp_path)
