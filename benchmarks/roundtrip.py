"""Save a trained LoRAM model, load it into a fresh one: the two must say the same.

Two ways. The adapter alone: LoRAM's start is deterministic, so a fresh model which is initialised
again has the same residual base, and only A and B are stored. Or the whole `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lora_kernels import LoRALinear

FACTORS = ("lora_A", "lora_B")

Adapt = Callable[[nn.Module], None]


def save_adapter(model: nn.Module, path: Path) -> None:
    """A and B of every layer, one safetensors file."""
    tensors = {
        f"{name}.{factor}": getattr(layer, factor).detach().contiguous()
        for name, layer in _lora_layers(model).items()
        for factor in FACTORS
    }
    save_file(tensors, path, metadata={"init_lora_weights": "loram"})


@torch.no_grad()
def load_adapter(model: nn.Module, path: Path) -> None:
    """Into a model that was freshly initialised with LoRAM; both must have the same layers."""
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        for name, layer in _lora_layers(model).items():
            for factor in FACTORS:
                getattr(layer, factor).copy_(file.get_tensor(f"{name}.{factor}"))
                stored.remove(f"{name}.{factor}")
    if stored:
        raise KeyError(f"the file holds factors of unknown layers: {sorted(stored)}")


def adapter_round_trip(
    model: nn.Module, fresh: nn.Module, adapt: Adapt, folder: Path
) -> tuple[nn.Module, int]:
    """(the fresh model with the adapter loaded, bytes on disk)."""
    path = folder / "adapter.safetensors"
    save_adapter(model, path)
    adapt(fresh)
    load_adapter(fresh, path)
    return fresh, path.stat().st_size


def state_dict_round_trip(
    model: nn.Module, fresh: nn.Module, adapt: Adapt, folder: Path
) -> tuple[nn.Module, int]:
    """(the fresh model with the whole state loaded, bytes on disk).

    `adapt` may give the fresh layers any start: the state brings base, A and B.
    """
    path = folder / "model.pt"
    torch.save(model.state_dict(), path)
    adapt(fresh)
    fresh.load_state_dict(torch.load(path, weights_only=True))
    return fresh, path.stat().st_size


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, LoRALinear)}
