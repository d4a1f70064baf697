"""The code of docs/guide/convolutions.md."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "convolutions.md"


@pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers")
def test_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = GUIDE.read_text().split("```python\n")[1].split("```")[0]
    exec(compile(code, GUIDE.name, "exec"), {})
    out = capsys.readouterr().out
    assert "conv1 [" in out and "pytorch_lora_weights.safetensors" in out
