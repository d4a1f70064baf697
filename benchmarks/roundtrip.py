"""Save a trained LoRAM model and load it into a fresh one: the two must say the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.methods import adapt, loram, zero_b
from lora_kernels import LoRALinear


def through_adapter_file(trained: nn.Module, fresh: nn.Module, path: Path) -> None:
    """Only A and B are stored.

    LoRAM's start is deterministic: initialising the fresh model again gives the very residual
    base that the trained A and B belong to.
    """
    save_file(
        {f"{layer}.{name}": factor for layer, name, factor in _factors(trained)},
        path,
        metadata={"init_lora_weights": "loram"},
    )
    adapt(fresh, _lora_layers(trained), loram)
    stored = load_file(path)
    with torch.no_grad():
        for layer, name, factor in _factors(fresh):
            factor.copy_(stored[f"{layer}.{name}"])


def through_state_dict(trained: nn.Module, fresh: nn.Module, path: Path) -> None:
    """Everything is stored, the residual base too: the fresh layers may have any start."""
    torch.save(trained.state_dict(), path)
    adapt(fresh, _lora_layers(trained), zero_b)
    fresh.load_state_dict(torch.load(path, weights_only=True))


def _lora_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def _factors(model: nn.Module) -> list[tuple[str, str, torch.Tensor]]:
    """(layer, "lora_A" or "lora_B", the factor itself) of every layer."""
    return [
        (layer, name, getattr(model.get_submodule(layer), name).detach())
        for layer in _lora_layers(model)
        for name in ("lora_A", "lora_B")
    ]
