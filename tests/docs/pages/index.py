"""docs/index.md on a tiny model under the name that the page loads."""

from __future__ import annotations

from pathlib import Path

import torch

from ...support.tiny_models import VOCABULARY, llama


def names(folder: Path) -> dict:
    llama().save_pretrained(folder / "HuggingFaceTB/SmolLM2-135M")
    torch.manual_seed(0)
    return {"batches": torch.randint(VOCABULARY, (2, 2, 8))}


def check(names: dict, output: str, folder: Path) -> None:
    assert output.startswith("adapter 'default': 14 layers")
    assert names["trained"][0].grad is None  # zero_grad of the last step
    assert (folder / "adapter/adapter_model.safetensors").exists()
