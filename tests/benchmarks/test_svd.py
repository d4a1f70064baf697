"""The SVD benchmark with tiny shapes: what it writes, and whether its accuracies are right."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

for package in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(package, reason="the benchmarks need what `make test` installs")

from benchmarks.cpu import svd  # noqa: E402


def test_files(tmp_path):
    argv = ["--shapes", "300x256", "--ranks", "4", "--rounds", "2", "--slow-rounds", "1"]
    assert svd.main([*argv, "--no-model", "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"svd.csv", "svd_speedups.csv", "svd_accuracy.csv", "svd_accuracy.png"}
    with (tmp_path / "svd_speedups.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    peers = {"svd_lowrank niter 16", "svd_lowrank niter 4", "scikit-learn", "linalg.svd"}
    assert {row["peer"] for row in rows} == peers | {"linalg.qr"}
    for row in rows:
        ratio = float(row["peer_ms"]) / float(row["ours_ms"])
        assert float(row["times_faster"]) == pytest.approx(ratio, rel=1e-4)


def test_accuracy():
    W = torch.randn(60, 40)
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    truth = svd.Truth.of(W)
    r = 5
    exact = [torch.from_numpy(t.copy()) for t in (U[:, :r], S[:r], Vh[:r])]
    found = truth.accuracy(tuple(exact))
    assert abs(found["residual"]) < 1e-9 and found["worst_sigma"] < 1e-9
    exact[1][2] *= 1.01
    left = np.sqrt((S[r:] ** 2).sum() + (0.01 * S[2]) ** 2) / np.linalg.norm(S[r:])
    found = truth.accuracy(tuple(exact))
    assert found["residual"] == pytest.approx(left - 1, rel=1e-6)
    assert found["worst_sigma"] == pytest.approx(0.01, rel=1e-6)
