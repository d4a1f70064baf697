r"""Fine-tune with transformers' Trainer: DDP, FSDP2 through accelerate, or DeepSpeed ZeRO-3.

    torchrun --nproc-per-node 2 -m examples.distributed.trainer
    torchrun --nproc-per-node 8 -m examples.distributed.trainer --fsdp \
        --model meta-llama/Llama-3.1-8B
    torchrun --nproc-per-node 8 -m examples.distributed.trainer \
        --deepspeed examples/distributed/zero3.json --model meta-llama/Llama-3.1-8B

The first process prints the report of `add_lora`, what Trainer logs, and where the adapter is
saved. Without --model, a tiny random Llama is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from examples.distributed.common import batches, new_parser, say, tiny_llama
from lora_kernels import LoRAConfig, add_lora, save_adapter

# The first process loads the model; accelerate sends the other processes their shards.
FSDP = {"version": 2, "cpu_ram_efficient_loading": True}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", help="a folder or a name on the Hub (default: a tiny Llama)")
    engine = parser.add_mutually_exclusive_group()
    engine.add_argument("--fsdp", action="store_true", help="FSDP2 by accelerate, on GPUs")
    engine.add_argument("--deepspeed", help="DeepSpeed's configuration, such as zero3.json")
    parser.add_argument("--batch", type=int, default=4, help="rows in a step, of each process")
    parser.add_argument("--out", default="lora-trainer", help="the adapter's folder")
    options = parser.parse_args(argv)
    if options.fsdp and not torch.cuda.is_available():
        parser.error("--fsdp needs GPUs: accelerate passes over FSDP on a CPU")
    return options


def arguments(options: argparse.Namespace) -> TrainingArguments:
    """Made before the model, so that `from_pretrained` partitions the weights under ZeRO-3."""
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        fsdp=options.fsdp,
        fsdp_config=FSDP if options.fsdp else None,
        deepspeed=options.deepspeed,
        use_cpu=not on_gpu,
        ddp_backend=None if on_gpu else "gloo",
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=on_gpu,
    )


def dataset(rows: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Random tokens as a stand-in for your data."""
    (tokens,) = batches(1, rows, vocabulary)
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(argv: Sequence[str] | None = None) -> None:
    """Every process calls every function; the first process writes the files."""
    options = parse(argv)
    training = arguments(options)  # joins the processes that torchrun has started
    model = AutoModelForCausalLM.from_pretrained(options.model or tiny_llama())
    config = LoRAConfig(r=options.r, lora_alpha=2 * options.r)
    say(add_lora(model, config, progress=False))  # before Trainer makes the optimizer
    rows = options.steps * options.batch * dist.get_world_size()
    trainer = Trainer(model, training, train_dataset=dataset(rows, model.config.vocab_size))
    trainer.train()
    save_adapter(trainer.model, options.out)
    say(f"saved to {options.out}")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
