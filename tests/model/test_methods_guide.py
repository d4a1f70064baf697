"""The code of docs/guide/methods.md, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ..support.tiny_models import llama

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "methods.md"


@pytest.mark.filterwarnings("ignore")
def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = llama()
    ids = torch.randint(model.config.vocab_size, (3, 12))
    batches = [{"input_ids": ids.flip(0), "labels": ids.flip(0)}] * 2

    def train(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        model.train()(**batches[0]).loss.backward()
        optimizer.step()

    names = {"model": model, "batches": batches, "ids": ids, "train": train}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    exec(compile("".join(blocks), str(GUIDE), "exec"), names)
    assert "adapter 'default'" in capsys.readouterr().out
    assert "lora_magnitude_vector" in (tmp_path / "dora/adapter_model.safetensors").read_text(
        errors="ignore"
    )
    for row, name in enumerate(("french", None, "german")):
        with torch.no_grad(), names["adapters_per_row"](model, [name]):
            assert torch.equal(model(input_ids=ids[row : row + 1]).logits[0], names["logits"][row])
