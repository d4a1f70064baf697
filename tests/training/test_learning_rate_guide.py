"""The code of docs/guide/learning_rate.md, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path

from lora_kernels import LoRAConfig

from ..support.tiny_models import llama

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "learning_rate.md"


def test_the_guide_runs(capsys):
    names = {"model": llama()}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    exec(compile("".join(blocks), str(GUIDE), "exec"), names)
    suggestion = names["suggestion"]
    assert suggestion.config == LoRAConfig(r=16, lora_alpha=16, init_lora_weights="loram")
    assert names["optimizer"].param_groups[0]["lr"] == suggestion.learning_rate
    first, second = capsys.readouterr().out.split("lora, r=16, lora_alpha=16 by rslora (s=4)")
    assert first.startswith("loram, r=16, lora_alpha=16 (s=1): learning rate")
    assert "from the study" in second
