"""docs/reference/svd.md on small weights."""

from __future__ import annotations

from pathlib import Path

import torch


def names(folder: Path) -> dict:
    torch.manual_seed(0)
    weights = torch.randn(4, 128, 96)
    return dict(zip(("weight", "w1", "w2", "w3"), weights, strict=True))


def check(names: dict, output: str, folder: Path) -> None:
    sigma = torch.linalg.svdvals(names["weight"])
    torch.testing.assert_close(names["S"], sigma[-64:].flip(0), rtol=1e-3, atol=1e-4)
    assert 0 <= names["error"] <= 1e-3
