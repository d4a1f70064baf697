"""Helpers for tests of sharded models: a batch, training on it, gathered tensors, and all that is
done with an adapted model from its start to its end.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels import disable_adapters, load_adapter, merge_lora, save_adapter, unload_lora

from .tiny_models import VOCABULARY

BATCH = torch.randint(1, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(0))


def fully_sharded(model: nn.Module, mesh=None, **options) -> nn.Module:
    """The Hugging Face model, with FSDP2 on each block and on the root."""
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def trained(model: nn.Module, steps: int = 5, parts: int | None = None) -> list[float]:
    """The losses of `steps` steps of AdamW, averaged over all processes. Each of `parts` groups of
    processes takes its share of the batch; if None, each process takes its own share.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    parts = ranks if parts is None else parts
    rank = dist.get_rank() * parts // ranks if ranks > 1 else 0
    own = BATCH.tensor_split(parts)[rank]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / ranks)
    return losses


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, gathered."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=BATCH).logits
    return found


def shared_folder() -> Path:
    """A new folder, the same on all ranks."""
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return Path(found[0])


def contents(folder: Path) -> dict[str, str]:
    """The digests of the files in a folder, by name."""
    return {
        file.name: hashlib.sha1(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())
    }


def life_alone(model: nn.Module) -> dict:
    """For an adapted model on one process: the tensors and files at the start, the losses of five
    steps, and the tensors after these steps.
    """
    found: dict = {"start": whole_tensors(model)}
    folder = Path(tempfile.mkdtemp())
    save_adapter(model, folder)
    found["files"] = contents(folder)
    found["losses"] = trained(model)
    found["end"] = whole_tensors(model)
    return found


def life(
    model: nn.Module, base: Tensor, bare: Callable[[], nn.Module], parts: int | None = None
) -> dict:
    """The results of `life_alone` for a sharded model whose base has the logits `base`. Also how
    much the logits differ at the start, with adapters off, in another model `bare()` that loads the
    adapter, after merging it there, and after removing it here. For `parts` see `trained`.
    """
    found: dict = {"start": whole_tensors(model)}
    folder, later = shared_folder(), shared_folder()
    found["saved"] = save_adapter(model, folder)
    found["files"] = contents(folder)
    found["at start"] = float((logits(model) - base).abs().max())
    found["losses"] = trained(model, parts=parts)
    found["end"] = whole_tensors(model)
    found["classes"] = {type(module).__name__ for module in model.modules()}
    found["later"] = later
    save_adapter(model, later, format="native")
    after = logits(model)
    with disable_adapters(model):
        found["disabled"] = float((logits(model) - base).abs().max())
    other = bare()
    load_adapter(other, later, progress=False)
    found["loaded"] = float((logits(other) - after).abs().max())
    merge_lora(other)
    found["merged"] = float((logits(other) - after).abs().max())
    unload_lora(model)
    found["unloaded"] = float((logits(model) - base).abs().max())
    plain = [*model.modules(), *other.modules()]
    found["left"] = [type(m).__name__ for m in plain if "LoRA" in type(m).__name__]
    return found


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest difference between two models' tensors, which have the same names."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
