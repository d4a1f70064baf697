"""Initialize and merge a checkpoint on disk without loading it; plain PEFT trains in between.

    python -m examples.streaming
    python -m examples.streaming --in-python

Both do the same, the first with commands, the second with the functions behind the commands. `init`
writes the model, with the start subtracted, to `out/start`, and the start to `out/start/adapter`.
Plain PEFT trains that adapter. `convert` makes an adapter for the original model, and `merge`
merges it. The script prints the commands and their summaries, and the largest logit difference
between the merged and the trained model. To use your own model, replace `out/model` with the folder
of its safetensors files.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from examples._tiny import batches, largest_difference, save_tiny_model
from lora_kernels import LoRAConfig, cli
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.files.checkpoint.merge import merge
from lora_kernels.files.serving.convert import convert


def shell(command: str) -> None:
    """Does what the command does in a shell, in this process."""
    print(f"$ {command}")
    if cli.main(shlex.split(command)[1:]):
        raise SystemExit(f"failed: {command}")


def train(folder: str) -> PeftModel:
    """A training loop with plain PEFT, without lora_kernels."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = PeftModel.from_pretrained(base, f"{folder}/adapter", is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--in-python", action="store_true", help="call functions, no commands")
    in_python = parser.parse_args().in_python
    save_tiny_model("out/model")

    if in_python:
        config = LoRAConfig(r=8, lora_alpha=8, init_lora_weights="loram")
        initialize(Path("out/model"), Path("out/start"), config, overwrite=True)
    else:
        shell(
            "lora-kernels init out/model out/start --method loram -r 8 --lora-alpha 8 --overwrite"
        )
    trained = train("out/start")
    trained.save_pretrained("out/trained")
    if in_python:
        convert(Path("out/trained"), Path("out/adapter"), start=Path("out/start/adapter"))
        merge(Path("out/model"), Path("out/adapter"), Path("out/merged"), overwrite=True)
    else:
        shell("lora-kernels convert out/trained out/adapter --start out/start/adapter")
        shell("lora-kernels merge out/model out/adapter out/merged --overwrite")
    merged = AutoModelForCausalLM.from_pretrained("out/merged")
    print(f"merged: {largest_difference(merged, trained):.1e} from the trained model")


if __name__ == "__main__":
    main()
