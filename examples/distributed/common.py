"""What the scripts share: the processes, and a model and data to run without your own."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

VOCABULARY = 96


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-r", type=int, default=8, help="rank (default 8)")
    parser.add_argument("--steps", type=int, default=3, help="(default 3)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default 1e-3)")
    return parser


def start() -> torch.device:
    """Joins the processes that torchrun has started, with NCCL on GPUs, else gloo. Returns the
    device of this process.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def say(text: object) -> None:
    """Prints on the first process."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def mean_loss(loss: Tensor) -> float:
    """The mean of the losses of all processes; every process must call this."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def new_folder() -> str:
    """A new temporary folder, the same on all processes."""
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return str(found[0])


def batches(
    steps: int, rows: int, vocabulary: int, part: int = 0, parts: int = 1, length: int = 16
) -> Iterator[Tensor]:
    """Random tokens as a stand-in for your data, [rows / parts, length] for each step.

    The tokens of a whole batch do not depend on the number of parts.

    Raises:
        ValueError: the rows cannot be divided evenly into the parts.

    """
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows cannot be cut into {parts} parts: change --batch")
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield torch.randint(1, vocabulary, (rows, length), generator=draw).chunk(parts)[part]


def tiny_llama() -> str:
    """The folder of a random Llama with two blocks, the same on all processes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = new_folder()
    if dist.get_rank() == 0:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    return folder
