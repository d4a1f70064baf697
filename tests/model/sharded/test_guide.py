"""The code of docs/guide/distributed.md, on a few processes and tiny models."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels.cli import main

from ...support.exhaustive import EXHAUSTIVE
from ...support.packages import needs_safetensors, needs_trainer, needs_transformers
from ...support.ranks import needs_ranks, on_ranks
from ...support.sharded import BATCH, logits, shared_folder
from ...support.tiny_models import llama

pytestmark = needs_ranks
GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "distributed.md"
SNIPPET = re.compile(r"<!-- snippet: (\w+) -->\n<!-- .+? -->\n```python\n(.*?)```", re.DOTALL)
CPU = torch.device("cpu")


def snippets() -> dict[str, str]:
    return dict(SNIPPET.findall(GUIDE.read_text()))


def executed(
    name: str, names: dict[str, Any], replaced: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, Any], str]:
    """The names that a snippet has bound, and what it printed. In its text, each key of `replaced`
    is replaced by the value.
    """
    code = snippets()[name]
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, str(GUIDE), "exec"), names)
    return names, printed.getvalue()


def test_the_page_has_these_snippets():
    assert list(snippets()) == ["transformers", "meta", "torch", "trainer"]
    assert GUIDE.read_text().count("```python") == 4


def saved_llama() -> Path:
    """The same on all processes."""
    folder = shared_folder()
    if dist.get_rank() == 0:
        llama().save_pretrained(folder)
    dist.barrier()
    return folder


@needs_transformers
@needs_safetensors
@pytest.mark.parametrize("layout", ["fsdp_size=2", "tp_size=2"])
def test_transformers(layout, tmp_path, monkeypatch):
    pytest.importorskip("transformers.distributed")
    import_module("transformers.models.auto.modeling_auto")  # once, not on each process
    monkeypatch.chdir(tmp_path)

    def work(rank: int) -> tuple[str, float]:
        base = saved_llama()
        own = BATCH.chunk(2)[rank] if "fsdp" in layout else BATCH
        names: dict[str, Any] = {"batches": [{"input_ids": own, "labels": own}] * 2}
        replaced = {"meta-llama/Llama-3.1-70B": str(base), "fsdp_size=8": layout}
        found, printed = executed("transformers", names, replaced)
        model, other = found["model"], found["other"]
        assert float((logits(model) - logits(llama())).abs().max()) > 1e-4
        return printed, float((logits(model.eval()) - logits(other.eval())).abs().max())

    for printed, difference in on_ranks(2, work):
        assert "in 2 parts by rows" in printed and difference < 1e-5
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Transformer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(width, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(12).reshape(2, 6)


def check_as_the_base(model: nn.Module) -> None:
    """All trains, and nothing has changed by the start."""
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), Transformer(16)(IDS), rtol=0, atol=1e-5)
    model(IDS).square().mean().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.grad is not None for n, p in trained.items())


def load_weights(model: nn.Module) -> None:
    """Of the whole `Transformer`, without a collective."""
    from torch.distributed.tensor import distribute_tensor

    whole = Transformer(16).state_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in whole:
                mesh, places = p.device_mesh, p.placements
                p.copy_(distribute_tensor(whole[name], mesh, places, src_data_rank=None))


def test_meta():
    def work(rank: int) -> str:
        names = {"Transformer": Transformer, "args": 16, "device": CPU}
        found, printed = executed("meta", {**names, "load_weights": load_weights})
        check_as_the_base(found["model"])
        return printed

    for printed in on_ranks(2, work):
        assert "blocks.*.up [32, 16] in 2 parts by rows" in printed


@pytest.mark.parametrize("evaluated", [False, True])
def test_torch(evaluated):
    def work(rank: int) -> str:
        names: dict[str, Any] = {"model": Transformer(16), "device": CPU}
        if evaluated:  # "before or after a first forward"
            code = snippets()["torch"].partition("print(")[0]
            exec(code, names)
            names["model"](IDS)
            printed = executed("torch", names, {code: ""})[1]
        else:
            printed = executed("torch", names)[1]
        check_as_the_base(names["model"])
        return printed

    for printed in on_ranks(4, work):
        assert "blocks.*.up [32, 16] in 4 parts" in printed


@needs_trainer
@needs_safetensors
@pytest.mark.skipif(not EXHAUSTIVE, reason="LORA_KERNELS_TEST_ALL=1 runs it")
def test_trainer(tmp_path, monkeypatch):
    """By DDP: accelerate has FSDP2 on GPUs only. Other tests here have the rest."""
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)

    def work(rank: int) -> float:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        base = saved_llama()
        options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        rows = [{"input_ids": row, "labels": row} for row in BATCH]
        names: dict[str, Any] = {"options": options, "dataset": rows}
        found, _ = executed("trainer", names, {"meta-llama/Llama-3.1-8B": str(base)})
        return float((logits(found["model"]) - logits(llama())).abs().max())

    assert all(moved > 1e-5 for moved in on_ranks(2, work))
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


@needs_transformers
@needs_safetensors
def test_streaming(tmp_path, monkeypatch, capsys):
    """The command on one process; tests/cli/test_ranks.py has several, and torchrun."""
    from torch.distributed.run import get_args_parser

    (line,) = re.findall(r"^torchrun .*", GUIDE.read_text(), re.MULTILINE)
    launch = get_args_parser().parse_args(shlex.split(line)[1:])
    assert (launch.nproc_per_node, launch.module) == ("8", True)
    assert launch.training_script == "lora_kernels.cli"
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained(tmp_path / "models" / "Llama-3-70B")
    assert main(launch.training_script_args) == 0
    assert "14 layers start with pissa, r = 16" in capsys.readouterr().out
    assert (tmp_path / "start" / "adapter" / "adapter_config.json").exists()
