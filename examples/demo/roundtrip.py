"""Save a trained model in each format and load it into a fresh model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from examples.demo.methods import METHODS
from lora_kernels import add_lora, load_adapter, save_adapter
from lora_kernels.model.install import adapted_layers


def through_peft(trained: nn.Module, fresh: nn.Module, path: Path) -> nn.Module:
    """As a PEFT adapter of rank 2r for the original weights, loaded with PEFT alone."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT does not limit the rank; vLLM does.
        warnings.filterwarnings("ignore", message="the adapter has rank")
        save_adapter(trained, path)
    return PeftModel.from_pretrained(fresh, path)


def through_native(trained: nn.Module, fresh: nn.Module, path: Path) -> nn.Module:
    """As a native adapter: A, B and, per layer, one number from which LoRAM's factors follow."""
    save_adapter(trained, path, format="native")
    load_adapter(fresh, path, progress=False)
    return fresh


def through_state_dict(trained: nn.Module, fresh: nn.Module, path: Path) -> nn.Module:
    """As a state_dict of the whole model, with the weights that LoRAM has changed."""
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
