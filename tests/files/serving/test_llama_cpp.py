"""llama.cpp itself, with our GGUF adapter, computes the logits of the adapted model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_kernels.files.serving.gguf import write_gguf
from lora_kernels.files.serving.gguf_names import ARCHITECTURES
from lora_kernels.model.config import LoRAConfig

from ...support.adapters import adapt_model, logits_64
from .gguf_models import NAMES, VOCABULARY, linear_layers, make_model, save_config, write_base

pytest.importorskip("gguf")
pytest.importorskip("transformers")
LIBRARY = Path(pytest.importorskip("xllamacpp").__file__).with_name("xllamacpp.abi3.so")
IDS = [(37 * i + 5) % VOCABULARY for i in range(12)]
# Of the largest logit. llama.cpp keeps keys and values in float16: 3e-3 with or without an adapter.
TOLERANCE = 6e-3


def llama_cpp(model: Path, *adapter: Path) -> np.ndarray:
    script = Path(__file__).with_name("llama_cpp.py")
    command = [sys.executable, script, LIBRARY, model, str(VOCABULARY), json.dumps(IDS), *adapter]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, (run.stdout + run.stderr)[-2000:]
    return np.array(json.loads(run.stdout.splitlines()[-1]))


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("kind", NAMES)
def test_llama_cpp_computes_the_adapted_model(kind, tmp_path):
    model = make_model(kind)
    layers = linear_layers(model)
    if ARCHITECTURES[kind].head and not model.config.tie_word_embeddings:
        layers.append("lm_head")
    config = LoRAConfig(
        r=4,
        lora_alpha=0.4,
        init_lora_weights="loram",
        use_rslora=True,
        rank_pattern={"v_proj": 2, "layers.1.self_attn.k_proj": 6, "c_proj": 3},
        alpha_pattern={"o_proj": 0.7},
    )
    state, deltas = adapt_model(model, layers, config)
    write_base(model, tmp_path / "base.gguf")
    write_gguf(state, save_config(model, tmp_path), tmp_path / "adapter.gguf")
    ids = torch.tensor([IDS])
    bare, adapted = (logits_64(model, d, ids)[0, -1].numpy() for d in ({}, deltas))
    assert error(bare, adapted) > 20 * TOLERANCE
    assert error(llama_cpp(tmp_path / "base.gguf"), bare) < TOLERANCE
    got = llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert error(got, adapted) < TOLERANCE
