"""Convolutions and attentions with FSDP2: sharded after `add_lora`, and refused before."""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import nn

from lora_kernels import LoRAConfig, load_adapter, merge_lora, save_adapter, unload_lora

from ...support.ranks import needs_ranks, on_ranks
from ...support.running import quiet

pytestmark = needs_ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.conv = nn.Conv1d(5, 6, 3)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.lin(x)
        return self.conv(x), self.attn(x, x, x)[0]


def adapted(model: nn.Module, residual: str) -> nn.Module:
    config = LoRAConfig(r=2, target_modules=["lin", "conv", "attn"], residual=residual)
    quiet(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    return model


def text_of(change, *arguments) -> str:
    try:
        change(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def test_run_save_and_are_refused_changes():
    torch.manual_seed(0)
    base, x = Net(), torch.randn(2, 5, 8)

    def work(rank: int) -> dict[str, object]:
        from torch.distributed.fsdp import fully_shard

        found: dict[str, object] = {}
        for residual in ("absorb", "implicit"):
            model = adapted(copy.deepcopy(base), residual)
            y = model(x)
            fully_shard(model)
            z = model(x)
            found[f"{residual} output"] = all(map(torch.equal, y, z))
            sum(part.square().sum() for part in z).backward()
            found[f"{residual} trains"] = all(
                p.grad is not None for p in model.parameters() if p.requires_grad
            )
            folder = tempfile.mkdtemp()
            save_adapter(model, folder)
            if rank == 0:
                load_adapter(other := copy.deepcopy(base), folder, progress=False)
                found[f"{residual} saved"] = all(map(torch.equal, other(x), y))
            found[f"{residual} merged"] = text_of(merge_lora, model)
            found[f"{residual} unloaded"] = text_of(unload_lora, model)
            found[f"{residual} left"] = type(model.lin).__name__
        model = fully_shard(copy.deepcopy(base))
        config = LoRAConfig(r=2, target_modules=["conv"])
        found["added"] = text_of(quiet, model, config)
        return found

    refused = "is sharded cannot be {}"
    for rank, found in enumerate(on_ranks(2, work)):
        assert "conv: a convolution" in found["added"]
        assert refused.format("adapted") in found["added"]
        for residual in ("absorb", "implicit"):
            assert found[f"{residual} output"] and found[f"{residual} trains"]
            assert rank or found[f"{residual} saved"]
            assert refused.format("merged") in found[f"{residual} merged"]
        assert refused.format("unloaded") in found["absorb unloaded"]
        assert found["absorb left"] == "FSDPLoRALinear" or "LoRALinear" in found["absorb left"]
        assert not found["implicit unloaded"] and "LoRA" not in found["implicit left"]
