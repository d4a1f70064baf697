"""docs/guide/models.md, which makes its model itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ...support import ROOT
from ..blocks import blocks_of


def names(folder: Path) -> dict:
    pytest.importorskip("transformers")
    return {}


def check(names: dict, output: str, folder: Path) -> None:
    page = ROOT / "docs/guide/models.md"
    printed = next(block.text for block in blocks_of(page) if not block.language)
    assert _untimed(output).startswith(_untimed(printed))
    assert "1 x model.layers.*.self_attn.q_proj [64, 64]: r=4, s=2, absorb" in output
    assert "['french', 'german']" in output
    assert "trained in full: model.norm.weight" in output
    # The implicit start cancels, so an untrained adapter computes what the base does.
    torch.testing.assert_close(names["french"], names["base"])
    model = names["model"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert "model.norm.weight" in trained
    assert all("lora_" in name for name in trained if name != "model.norm.weight")


def _untimed(text: str) -> str:
    return re.sub(r"in [\d.]+ s;", "in s;", text)
