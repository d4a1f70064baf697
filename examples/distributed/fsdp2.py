r"""Fine-tune a transformers model that is sharded by FSDP2, tensor parallelism or both.

    torchrun --nproc-per-node 2 -m examples.distributed.fsdp2
    torchrun --nproc-per-node 2 -m examples.distributed.fsdp2 --tp 2
    torchrun --nproc-per-node 8 -m examples.distributed.fsdp2 --tp 2 \
        --model meta-llama/Llama-3.1-70B

The first process prints the report of `add_lora`, with each shape followed by the sharding of its
weight, the loss of each step, where the adapter is saved, and the largest logit difference between
the trained model and a second model that has loaded the adapter. Without --model, a tiny random
Llama is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from examples.distributed.common import (
    batches,
    mean_loss,
    new_folder,
    new_parser,
    say,
    start,
    tiny_llama,
)
from lora_kernels import LoRAConfig, add_lora, load_adapter, save_adapter


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", help="a folder or a name on the Hub (default: a tiny Llama)")
    parser.add_argument("--tp", type=int, default=1, help="processes to a layer (default 1)")
    parser.add_argument("--fsdp", type=int, help="processes of FSDP2 (default: all / tp)")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step, of all processes")
    parser.add_argument("--out", help="the adapter's folder (default: a temporary one)")
    return parser.parse_args(argv)


def train(model: nn.Module, options: argparse.Namespace, device: torch.device) -> None:
    """AdamW on the factors. Processes that share a layer (tp) get the same rows."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.lr)
    part, parts = dist.get_rank() // options.tp, dist.get_world_size() // options.tp
    rows = batches(options.steps, options.batch, model.config.vocab_size, part, parts)
    for step, tokens in enumerate(rows, start=1):
        tokens = tokens.to(device)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        say(f"step {step}: loss {mean_loss(loss):.4f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Every process calls every function; the first process writes the files."""
    options = parse(argv)
    device = start()
    fsdp = options.fsdp or dist.get_world_size() // options.tp
    layout = DistributedConfig(fsdp_size=fsdp, tp_size=options.tp)
    path = options.model or tiny_llama()

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, distributed_config=layout).to(device)

    model = load()
    config = LoRAConfig(r=options.r, lora_alpha=2 * options.r)
    say(add_lora(model, config, progress=False))
    train(model, options, device)
    folder = options.out or new_folder()
    save_adapter(model, folder)
    say(f"saved to {folder}")

    other = load()
    load_adapter(other, folder, progress=False)  # on any number of processes
    tokens = next(batches(1, 1, model.config.vocab_size)).to(device)
    with torch.no_grad():
        trained, loaded = (m.eval()(input_ids=tokens).logits for m in (model, other))
    say(f"loaded: largest difference of a logit {float((trained - loaded).abs().max()):.1e}")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
