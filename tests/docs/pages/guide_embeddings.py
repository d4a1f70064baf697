"""docs/guide/embeddings.md, which makes its model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open


def names(folder: Path) -> dict:
    pytest.importorskip("transformers")
    return {}


def check(names: dict, output: str, folder: Path) -> None:
    assert "model.embed_tokens [32, 100]: r=8, s=1, implicit" in output
    with safe_open(folder / "adapter/adapter_model.safetensors", "pt") as file:
        assert any(name.endswith("lora_embedding_A") for name in file.keys())  # noqa: SIM118
    model = names["model"]
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)
