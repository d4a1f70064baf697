"""The error of an adapter's update after an engine's cast to 16 bits, for two forms of the file.

`python -m benchmarks.cpu.portable`. The seven projections of SmolLM2-135M's first block start with
each method at r = 16, and every entry of A and B moves by about δ. The error is ‖ΔW − ΔW'‖_F /
‖ΔW‖_F over the block, where ΔW' is computed from the tensors in 16 bits. The last columns are the
time that `save_adapter` takes for all 210 layers, and the length of the recipe that restores every
bit.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import smollm2
from benchmarks.common.harness import environment
from benchmarks.common.report import RESULTS, write_csv
from lora_kernels import LoRAConfig, add_lora
from lora_kernels.files.adapter.compression import update_errors
from lora_kernels.files.adapter.folder import write_adapter
from lora_kernels.layers.state import LayerState
from lora_kernels.model.config import AdapterState
from lora_kernels.model.lora import adapter_state

RANK = 16
STARTS = ("loram", "pissa")
MOVES = (1e-4, 3e-4, 1e-3, 1e-2)
BLOCK = "model.layers.0."
FORMS = ("[A; A0], [B, -B0]", "[A; A-A0], [B-B0, B0]")


def moved(state: AdapterState, size: float) -> AdapterState:
    """The adapter with every entry of A and B moved by about `size`."""
    generator = torch.Generator().manual_seed(0)

    def away(factor: Tensor) -> Tensor:
        return factor + size * torch.randn(factor.shape, generator=generator)

    layers = {
        name: replace(layer, lora_A=away(layer.lora_A), lora_B=away(layer.lora_B))
        for name, layer in state.layers.items()
    }
    return replace(state, layers=layers)


def doubled(layer: LayerState) -> tuple[Tensor, Tensor]:
    """[A; A₀] and s·[B, −B₀], as PEFT's own conversion of PiSSA writes them."""
    start = layer.start_factors()
    assert start is not None
    right, left = torch.cat([layer.lora_A, start[0]]), torch.cat([layer.lora_B, -start[1]], 1)
    return right, layer.scaling * left


def factors(form: str, state: AdapterState) -> dict[str, tuple[Tensor, Tensor]]:
    """A' and s·B' of each layer."""
    if form == FORMS[0]:
        return {name: doubled(layer) for name, layer in state.layers.items()}
    return {name: layer.portable_factors() for name, layer in state.layers.items()}


def saved(state: AdapterState, seconds: list[float]) -> dict[str, object]:
    """The time to save, and the length of the recipe that restores every bit."""
    numbers = sum(layer.lora_B.numel() for layer in state.layers.values())
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):
            began = perf_counter()
            done = write_adapter(folder, state)
            seconds.append(perf_counter() - began)
        size = done.files["adapter_model.safetensors"]
    raw = sum(4 * 2 * (f.lora_A.numel() + f.lora_B.numel()) for f in state.layers.values())
    return {
        "save_s": f"{min(seconds):.3f}",
        "file_bytes": size,
        "recipe_bits_per_number_of_B": f"{8 * (size - raw) / numbers:.2f}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table and write portable.csv."""
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.portable", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file")
    options, rows = parser.parse_args(argv), []
    table = Table("start", "δ", "form", "bf16", "fp16", title="error of ΔW after a cast")
    for start in STARTS:
        model = smollm2.load_model()
        add_lora(model, LoRAConfig(r=RANK, lora_alpha=RANK, init_lora_weights=start))
        whole = adapter_state(model)
        for move in MOVES:
            state = moved(whole, move)
            costs = saved(state, [])
            block = {n: layer for n, layer in state.layers.items() if n.startswith(BLOCK)}
            state = replace(state, layers=block)
            for form in FORMS:
                pairs = factors(form, state)
                errors = []
                for dtype in (torch.bfloat16, torch.float16):
                    cast = {n: (a.to(dtype), b.to(dtype)) for n, (a, b) in pairs.items()}
                    errors.append(f"{update_errors(state, cast)[1]:.2e}")
                table.add_row(start, f"{move:g}", form, *errors)
                rows.append(
                    {"model": "SmolLM2-135M", "start": start, "r": RANK, "delta": move}
                    | {"form": form, "error_bf16": errors[0], "error_fp16": errors[1]}
                    | (costs if form == FORMS[1] else dict.fromkeys(costs, ""))
                    | environment()
                )
    Console().print(table, markup=False)
    write_csv(options.out / "portable.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
