"""A small checkpoint with the oddities of large ones, and small real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ...support import tiny_models
from .folders import Stored, random_tensor, write_model

SHAPES = {"q_proj": (24, 16), "up_proj": (40, 16), "down_proj": (16, 40)}


def odd_shards(seed: int = 0, dtypes: tuple[str, ...] = ("F32", "BF16", "F16")) -> list[dict]:
    """A shard for each dtype, with projections of that dtype, between tensors of other kinds: fp8
    and integers of odd sizes, after which nothing is aligned, scalars and an empty one.
    """
    rng = np.random.default_rng(seed)
    shards: list[dict[str, Stored]] = []
    for block, dtype in enumerate(dtypes):
        name = f"model.layers.{block}"
        tensors = {f"{name}.fp8.weight": random_tensor(rng, "F8_E4M3", (5, 7))}
        for layer, shape in SHAPES.items():
            tensors[f"{name}.{layer}.weight"] = random_tensor(rng, dtype, shape)
            tensors[f"{name}.{layer}.scale"] = random_tensor(rng, "F32", ())
        tensors[f"{name}.norm.weight"] = random_tensor(rng, "F32", (16,))
        tensors[f"{name}.empty"] = random_tensor(rng, "F16", (0, 4))
        tensors[f"{name}.position_ids"] = random_tensor(rng, "I64", (1, 3))
        tensors[f"{name}.mask"] = random_tensor(rng, "BOOL", (3,))
        shards.append(tensors)
    shards[0]["model.embed_tokens.weight"] = random_tensor(rng, "BF16", (50, 16))
    return shards


@pytest.fixture
def odd_model(tmp_path) -> Path:
    folder = tmp_path / "odd"
    write_model(folder, odd_shards())
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A Llama of two layers in four shards."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models") / "llama"
    model = tiny_models.llama(hidden_size=64, intermediate_size=96)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> Path:
    """A GPT-2 of two layers, whose linear layers are Conv1D."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    tiny_models.gpt2().save_pretrained(folder)
    return folder
