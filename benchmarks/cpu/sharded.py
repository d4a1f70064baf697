"""Adapters of this package and PEFT on models sharded by transformers, against one process.

`python -m benchmarks.cpu.sharded`. A Llama with two small blocks is loaded with a
`DistributedConfig` on 2 or 4 processes over gloo, adapted, trained for five steps of AdamW and
saved. Each package runs with B = 0 and with one of its starts that change W; the oracle is the same
package on one process. No times are measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from benchmarks.common.harness import environment
from benchmarks.common.report import RESULTS, print_table, write_csv
from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter

LAYOUTS: dict[str, dict[str, int]] = {
    "FSDP2": {"fsdp_size": 2},
    "HSDP": {"fsdp_size": 2, "dp_replicate_size": 2},
    "TP": {"tp_size": 2},
    "FSDP2 over TP": {"tp_size": 2, "fsdp_size": 2},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
Adapt = Callable[[nn.Module], nn.Module]


def ours(start: str) -> Adapt:
    """`add_lora` with this start."""

    def adapt(model: nn.Module) -> nn.Module:
        config = LoRAConfig(r=4, lora_alpha=8, init_lora_weights=start, target_modules=TARGETS)
        add_lora(model, config, progress=False)
        return model

    return adapt


def of_peft(start: bool | str) -> Adapt:
    """`get_peft_model` with this start."""

    def adapt(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        options: dict[str, Any] = {"init_lora_weights": start, "target_modules": TARGETS}
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))

    return adapt


METHODS: dict[str, tuple[str, Adapt]] = {
    "lora_kernels, loram": ("lora_kernels", ours("loram")),
    "lora_kernels, pissa": ("lora_kernels", ours("pissa")),
    "PEFT, LoRA": ("PEFT", of_peft(True)),
    "PEFT, pissa": ("PEFT", of_peft("pissa")),
}


def base(folder: Path) -> None:
    """Writes a small Llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=2))
    model.save_pretrained(folder)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=BATCH).logits
    return found


def trained(model: nn.Module, parts: int) -> list[float]:
    """The mean losses of five steps; each of `parts` groups of processes has its share of the
    batch.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    own = BATCH.tensor_split(parts)[rank * parts // world]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The trainable factors, gathered on this process."""
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    return {
        n: p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for n, p in found.items()
    }


def spread(model: nn.Module) -> float:
    """The largest difference of a factor between processes."""
    largest = 0.0
    for tensor in factors(model).values():
        every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(every, tensor.contiguous())
        largest = max(largest, *(float((other - every[0]).abs().max()) for other in every))
    return largest


def measure(row: dict[str, object], method: str, layout: dict[str, int], folder: Path) -> None:
    """Run one case on one process of the layout; the row gets the measurements, in order."""
    package, adapt = METHODS[method]
    shards = DistributedConfig(**layout)
    before = logits(AutoModelForCausalLM.from_pretrained(folder))
    model = adapt(AutoModelForCausalLM.from_pretrained(folder, distributed_config=shards))
    row["start error"] = float((logits(model) - before).abs().max())
    parts = layout.get("fsdp_size", 1) * layout.get("dp_replicate_size", 1)
    row["losses"] = trained(model, parts)
    row["rank spread"] = spread(model)
    out = folder / f"adapter {method} {layout}"
    after = logits(model)
    if package == "PEFT":
        model.save_pretrained(out, is_main_process=dist.get_rank() == 0)
        dist.barrier()
        one = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out)
    else:
        save_adapter(model, out)
        one = AutoModelForCausalLM.from_pretrained(folder)
        load_adapter(one, out, progress=False)
    row["reload error"] = float((logits(one) - after).abs().max())


def run(
    rank: int, world: int, method: str, layout: dict[str, int], folder: Path, out: Path
) -> None:
    """Run one process of a case; the first process writes the row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    file = f"file://{out}.store"
    wait = timedelta(seconds=30)  # for a process that has failed
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world, timeout=wait)
    row: dict[str, object] = {}
    try:
        measure(row, method, layout, folder)
    except Exception as error:  # PEFT's errors are part of the table
        row["failure"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    torch.save(row, Path(f"{out}.{rank}"))


def alone(method: str, folder: Path) -> list[float]:
    """The losses of a run on one process."""
    return trained(METHODS[method][1](AutoModelForCausalLM.from_pretrained(folder)), 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs all cases, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args(arguments).out
    warnings.simplefilter("ignore")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base(folder)
        expected = {method: alone(method, folder) for method in METHODS}
        for layout, sizes in LAYOUTS.items():
            world = 1
            for size in sizes.values():
                world *= size
            for method in METHODS:
                file = folder / f"{len(rows)}.row"
                print(f"{layout}: {method}", flush=True)
                started = (world, method, sizes, folder, file)
                try:
                    multiprocessing.start_processes(run, started, world, start_method="fork")
                    files = [f"{file}.{rank}" for rank in range(world)]
                    row = _row([torch.load(name, weights_only=False) for name in files])
                except multiprocessing.ProcessExitedException as error:
                    row = {"failure": str(error)}
                losses = row.pop("losses", None)
                if losses is not None:
                    pairs = zip(losses, expected[method], strict=True)
                    row["loss error"] = max(abs(a - b) for a, b in pairs)
                rows.append({"layout": layout, "processes": world, "method": method} | row)
    print_table(Console(), "sharded models", [_shown(row) for row in rows])
    write_csv(out / "sharded.csv", [row | environment() for row in rows])


def _row(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The first process's row. If processes failed, the row of the first that failed, not of those
    that waited for it.
    """
    failed = [row for row in found if "failure" in row]
    causes = [row for row in failed if "gloo" not in row["failure"]]
    return (causes or failed or found)[0]


def _shown(row: dict[str, object]) -> dict[str, str]:
    columns = ("layout", "method", "start error", "loss error", "rank spread", "reload error")
    numbers = {c: row.get(c, "") for c in columns}
    shown = {c: f"{v:.1e}" if isinstance(v, float) else str(v) for c, v in numbers.items()}
    return shown | {"failure": escape(str(row.get("failure", "")))}


if __name__ == "__main__":
    sys.exit(main())
