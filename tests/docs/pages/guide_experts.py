"""docs/guide/experts.md, with a tiny model in the place of Qwen3-30B-A3B."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ...support.tiny_experts import tiny_experts

IDS = torch.tensor([[5, 17, 2, 44, 8, 61, 30]])


def names(folder: Path) -> dict:
    pytest.importorskip("peft")
    tiny_experts("Qwen3Moe").save_pretrained(folder / "Qwen/Qwen3-30B-A3B")
    return {"batches": [{"input_ids": IDS, "labels": IDS}] * 2}


def check(names: dict, output: str, folder: Path) -> None:
    assert "4 experts x [48, 32]: r=8" in output
    with torch.no_grad():
        found, expected = (names[m].eval()(input_ids=IDS).logits for m in ("served", "model"))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
