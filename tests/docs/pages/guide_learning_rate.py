"""docs/guide/learning_rate.md on a tiny model, and on its checkpoint."""

from __future__ import annotations

from pathlib import Path

from lora_kernels import LoRAConfig

from ...support.tiny_models import llama


def names(folder: Path) -> dict:
    model = llama()
    model.save_pretrained(folder / "models/Llama-3-8B")
    return {"model": model}


def check(names: dict, output: str, folder: Path) -> None:
    suggestion = names["suggestion"]
    assert suggestion.config == LoRAConfig(r=16, lora_alpha=16, init_lora_weights="loram")
    assert names["optimizer"].param_groups[0]["lr"] == suggestion.learning_rate
    first, second = output.split("lora, r=16, lora_alpha=16 by rslora (s=4)")
    assert first.startswith("loram, r=16, lora_alpha=16 (s=1): learning rate")
    study, command = second.split("loram, r=16, lora_alpha=16 (s=1): learning rate")
    assert "from the study" in study
    # The command finds the rate that the function found for the same model and reference.
    assert command.splitlines()[0].split()[0] == first.splitlines()[0].split()[6]
