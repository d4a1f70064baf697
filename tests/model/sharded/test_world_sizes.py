"""An adapter that was trained on some processes goes on training on another number of them."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter

from ...support.exhaustive import EXHAUSTIVE
from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import fully_sharded, shared_folder, trained, whole_tensors
from ...support.tiny_models import llama

pytestmark = needs_ranks

CONFIG = LoRAConfig(r=4)
SIZES = (1, 2, 4, 8) if EXHAUSTIVE else (1, 2, 4)


def digest(tensors: dict[str, Tensor]) -> str:
    """Of the residual base."""
    found = hashlib.sha1()
    for name, tensor in sorted(tensors.items()):
        if "lora_" not in name:
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def model_on(world: int) -> nn.Module:
    return llama() if world == 1 else fully_sharded(llama())


@functools.cache
def saved_on(world: int) -> Path:
    """A folder of an adapter that was trained on so many processes."""

    def work(rank: int) -> Path:
        folder = Path(tempfile.mkdtemp()) if world == 1 else shared_folder()
        model = model_on(world)
        add_lora(model, CONFIG, progress=False)
        trained(model, 2, parts=min(world, 4))
        save_adapter(model, folder, format="native")
        return folder

    return on_ranks(world, work)[0]


def resumed_on(world: int, folder: Path) -> tuple[str, list[float]]:
    def work(rank: int) -> tuple[str, list[float]]:
        model = model_on(world)
        load_adapter(model, folder, progress=False)
        return digest(whole_tensors(model)), trained(model, 3, parts=min(world, 4))

    results = on_ranks(world, work)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize("saved", SIZES if EXHAUSTIVE else (2,))
def test_resumed_on_any_world_size(saved):
    base, losses = resumed_on(1, saved_on(saved))
    for world in SIZES[1:]:
        other_base, other = resumed_on(world, saved_on(saved))
        assert other_base == base
        assert max(abs(a - b) for a, b in zip(losses, other, strict=True)) < 1e-5


def test_what_was_saved_is_the_same():
    """Of one and of two processes: to the rounding of two steps of training."""
    first, second = (whole_of(saved_on(world)) for world in (1, 2))
    assert first.keys() == second.keys()
    assert max(float((first[n] - second[n]).abs().max()) for n in first) < 1e-5


def whole_of(folder: Path) -> dict[str, Tensor]:
    model = llama()
    load_adapter(model, folder, progress=False)
    with torch.no_grad():
        return whole_tensors(model)
