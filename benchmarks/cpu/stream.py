"""Initializing a checkpoint on disk, compared with copying it: `python -m benchmarks.cpu.stream`.

Every tool must read and write each byte once, as `cp` does. Initializing adds two passes over the
weights in memory: the norm and the subtraction. The variants take turns; each round writes new
files on the same disk, and deleting them is not timed. `cp` and `init` let the system write to the
disk later; `cp + fsync` and `init --sync` wait until it has written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.common.harness import Variant, dtype_name, environment, interleave
from benchmarks.common.report import RESULTS, print_timings, write_csv
from lora_kernels._utils.safetensors import Entry, render
from lora_kernels._utils.safetensors import dtype_name as stored_name
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.model.config import LoRAConfig

# Llama-2-7B's blocks: (name, out, in).
BLOCK = (
    ("self_attn.q_proj", 4096, 4096),
    ("self_attn.k_proj", 4096, 4096),
    ("self_attn.v_proj", 4096, 4096),
    ("self_attn.o_proj", 4096, 4096),
    ("mlp.gate_proj", 11008, 4096),
    ("mlp.up_proj", 11008, 4096),
    ("mlp.down_proj", 4096, 11008),
)
READ = 16 << 20


def write_checkpoint(folder: Path, dtype: torch.dtype, blocks: int) -> int:
    """Write a model with one shard per block, and its index; return its size in bytes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    index, size = {}, 0
    for block in range(blocks):
        file = folder / f"model-{block + 1:05d}-of-{blocks:05d}.safetensors"
        shapes = {f"model.layers.{block}.{name}.weight": (n, m) for name, n, m in BLOCK}
        shapes |= {f"model.layers.{block}.{x}_layernorm.weight": (4096,)
                   for x in ("input", "post_attention")}  # fmt: skip
        if block == 0:
            shapes["model.embed_tokens.weight"] = (32000, 4096)
        entries, position = [], 0
        for name, shape in shapes.items():
            end = position + torch.Size(shape).numel() * dtype.itemsize
            entries.append(Entry(name, stored_name(dtype), shape, position, end))
            position = end
        layout = render(entries, {"format": "pt"})
        with file.open("wb") as opened:
            opened.write(layout.head())
            for shape in shapes.values():
                tensor = torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
                opened.write(memoryview(tensor.view(torch.uint8).numpy()))
        index |= dict.fromkeys(shapes, file.name)
        size += layout.file_size
    content = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return size


def variants(source: Path, scratch: Path, r: int) -> dict[str, Variant]:
    """The variants by name; each writes into a folder that does not exist yet."""
    out = scratch / "out"

    def clean() -> Path:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        return out

    def variant(run: Callable[[Path], object]) -> Variant:
        return Variant(run, clean)

    return {
        "cp": variant(partial(copy, source)),
        "cp + fsync": variant(partial(copy, source, sync=True)),
        "read + write": variant(partial(copy_by_hand, source)),
        "init loram": variant(lambda path: initialize(source, path, LoRAConfig(r=r))),
        "init loram --sync": variant(
            lambda path: initialize(source, path, LoRAConfig(r=r), sync=True)
        ),
    }


def copy(source: Path, out: Path, sync: bool = False) -> None:
    """Copy with the system's `cp`."""
    subprocess.run(["cp", "-r", source, out], check=True)
    if sync:
        subprocess.run(["sync", *out.iterdir()], check=True)


def copy_by_hand(source: Path, out: Path) -> None:
    """Copy in a loop of reads and writes on one thread."""
    out.mkdir()
    buffer = memoryview(bytearray(READ))
    for file in source.iterdir():
        with file.open("rb", 0) as before, (out / file.name).open("wb", 0) as after:
            while count := before.readinto(buffer):
                after.write(buffer[:count])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu.stream", description=__doc__)
    parser.add_argument(
        "--blocks", type=int, default=4, help="blocks of Llama-2-7B, one shard each"
    )
    parser.add_argument("-r", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--disk", type=Path, help="folder on the disk to measure (default: the current folder)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each dtype as soon as it is measured."""
    options, console = parse(argv), Console()
    console.print(", ".join(f"{key} {value}" for key, value in environment().items()))
    rows = []
    with tempfile.TemporaryDirectory(dir=options.disk or Path.cwd()) as folder:
        for dtype in (torch.float32, torch.bfloat16):
            scratch = Path(folder) / dtype_name(dtype)
            scratch.mkdir()
            size = write_checkpoint(scratch / "model", dtype, options.blocks)
            table = variants(scratch / "model", scratch, options.r)
            timings = interleave(table, rounds=options.rounds, warmup=1, baseline="cp")
            print_timings(console, f"{dtype_name(dtype)}, {size / 1e9:.2f} GB", timings, "cp")
            for timing in timings:
                facts = {"dtype": dtype_name(dtype), "bytes": size, "r": options.r}
                speed = {"gb_s": size / 1e9 / timing.median, "of_cp": 1 / timing.ratio()}
                rows.append({**facts, **timing.row(), **speed, **environment()})
            shutil.rmtree(scratch)
    write_csv(options.out / "stream.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
