"""docs/guide/fused.md, which makes its model itself."""

from __future__ import annotations

from pathlib import Path

import pytest


def names(folder: Path) -> dict:
    pytest.importorskip("transformers")
    return {}


def check(names: dict, output: str, folder: Path) -> None:
    assert "r=6 (3 parts), s=4" in output
    assert "torch.Size([6, 32]) torch.Size([64, 6]) 4.0" in output
