"""Save a trained model in every way there is, and load it into a fresh one: all say the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from examples.demo.methods import METHODS
from lora_kernels import add_lora, load_adapter, save_adapter
from lora_kernels.model import adapted_layers


def through_peft(trained: nn.Module, fresh: nn.Module, path: Path) -> nn.Module:
    """An adapter of rank 2r on the original base, loaded by plain PEFT."""
    from peft import PeftModel

    save_adapter(trained, path)
    return PeftModel.from_pretrained(fresh, path)


def through_native(trained: nn.Module, fresh: nn.Module, path: Path) -> nn.Module:
    """A and B, and one number for each layer's start."""
    save_adapter(trained, path, format="native")
    load_adapter(fresh, path, progress=False)
    return fresh


def through_state_dict(trained: nn.Module, fresh: nn.Module, path: Path) -> nn.Module:
    """Everything, the residual base too."""
    path.mkdir()
    torch.save(trained.state_dict(), path / "model.pt")
    same = replace(METHODS["LoRAM"], target_modules=list(adapted_layers(trained)))
    add_lora(fresh, same, progress=False)
    fresh.load_state_dict(torch.load(path / "model.pt", weights_only=True))
    return fresh


TRIPS: dict[str, Callable[[nn.Module, nn.Module, Path], nn.Module]] = {
    "adapter, loaded by PEFT": through_peft,
    "native adapter": through_native,
    "state_dict": through_state_dict,
}
