"""Shard your own model with FSDP2 and fine-tune it; no process ever holds the whole model.

    torchrun --nproc-per-node 2 -m examples.distributed.from_meta

The layers are adapted while the weights are on the meta device. Each process then reads its own
shards from a checkpoint of torch.distributed.checkpoint, and `start_adapters` computes the starts
on the shards. The first process prints the report of `start_adapters`, the loss of each step, where
the adapter is saved, and the largest logit difference between the trained model and a second model
that has loaded the adapter. Without --checkpoint, the script writes a checkpoint of random weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812  (its usual name)

from examples.distributed.common import (
    VOCABULARY,
    batches,
    mean_loss,
    new_folder,
    new_parser,
    say,
    start,
)
from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter, start_adapters


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, blocks: int = 2, length: int = 16) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm, self.lm_head = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


def sharded(model: Transformer, device: torch.device) -> Transformer:
    """The model with memory for this process's shards, but no values yet."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device=device)
    return model


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Each process reads its shards. For a folder of safetensors files, call dcp.load with
    `storage_reader=dcp.HuggingFaceStorageReader(checkpoint)`.
    """
    weights = {n: t for n, t in model.state_dict().items() if ".adapters." not in n}
    dcp.load(weights, checkpoint_id=checkpoint)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--checkpoint", help="a folder of torch.distributed.checkpoint")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step, of all processes")
    parser.add_argument("--out", help="the adapter's folder (default: a temporary one)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Every process calls every function; the first process writes the files."""
    options = parse(argv)
    device = start()
    checkpoint = options.checkpoint or random_checkpoint()

    with torch.device("meta"):
        model = Transformer()
    config = LoRAConfig(r=options.r, lora_alpha=2 * options.r)
    add_lora(model, config, progress=False)  # adapt the layers now ...
    sharded(model, device)
    load_weights(model, checkpoint)
    say(start_adapters(model, progress=False))  # ... compute their starts after loading

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.lr)
    part, parts = dist.get_rank(), dist.get_world_size()
    rows = batches(options.steps, options.batch, VOCABULARY, part, parts)
    for step, tokens in enumerate(rows, start=1):
        tokens = tokens.to(device)
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        say(f"step {step}: loss {mean_loss(loss):.4f}")
    folder = options.out or new_folder()
    save_adapter(model, folder)
    say(f"saved to {folder}")

    with torch.device("meta"):
        other = Transformer()
    load_weights(sharded(other, device), checkpoint)
    load_adapter(other, folder, progress=False)  # on any number of processes
    tokens = next(batches(1, 1, VOCABULARY)).to(device)
    with torch.no_grad():
        difference = (model(tokens) - other(tokens)).abs().max()
    say(f"loaded: largest difference of a logit {float(difference):.1e}")


def random_checkpoint() -> str:
    """A checkpoint in a temporary folder; its weights do not depend on the number of processes."""
    folder = new_folder()
    torch.manual_seed(0)
    dcp.save(Transformer().state_dict(), checkpoint_id=folder)
    return folder


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
