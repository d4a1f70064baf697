"""The code of docs/guide/experts.md, on a tiny model in place of Qwen3-30B-A3B."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ..support.tiny_experts import tiny_experts

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "experts.md"


@pytest.mark.filterwarnings("ignore")
def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    tiny_experts("Qwen3Moe").save_pretrained("base")
    ids = torch.tensor([[5, 17, 2, 44, 8, 61, 30]])
    names = {"batches": [{"input_ids": ids, "labels": ids}] * 2}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    code = "".join(blocks).replace("Qwen/Qwen3-30B-A3B", "base").replace("bfloat16", "float32")
    exec(compile(code, str(GUIDE), "exec"), names)
    assert "4 experts x [48, 32]: r=8" in capsys.readouterr().out
    with torch.no_grad():
        found, expected = (names[m].eval()(input_ids=ids).logits for m in ("served", "model"))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
