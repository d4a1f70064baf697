"""docs/guide/convolutions.md, which makes its model itself."""

from __future__ import annotations

from pathlib import Path

import pytest


def names(folder: Path) -> dict:
    pytest.importorskip("diffusers")
    return {}


def check(names: dict, output: str, folder: Path) -> None:
    assert "conv1 [" in output and "pytorch_lora_weights.safetensors" in output
