"""`lora-kernels merge`: merges an adapter into a model."""

from __future__ import annotations

import argparse
import time

from .._utils.progress import byte_bar
from ..files.checkpoint.merge import merge
from ..files.io.journal import Ranks
from ._options import (
    RANKS,
    Commands,
    add_command,
    add_dtype,
    add_overwrite,
    add_path,
    add_quiet,
    dtype_of,
)

_DESCRIPTION = f"""\
Merges an adapter into a model, tensor by tensor, without loading the model.

ADAPTER is a folder that PEFT or lora_kernels wrote, in any format. W + s(BA - B0 A0) is summed in
float32 and rounded once; saved modules and biases replace those of the base. Everything else is
copied. Repeat the same command to continue a run that was killed.

{RANKS}"""
_EXAMPLES = """\
examples:
  lora-kernels merge models/Llama-3-8B adapter merged
  lora-kernels merge models/Llama-3-8B adapter merged --dtype bfloat16
  torchrun --nproc-per-node 8 -m lora_kernels.cli merge models/Llama-3-70B adapter merged
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands, "merge", "merge an adapter into a model on disk", _DESCRIPTION, _EXAMPLES
    )
    add_path(parser, "BASE", "folder of the model, with safetensors files")
    add_path(parser, "ADAPTER", "folder of an adapter")
    add_path(parser, "OUT", "a new folder")
    add_dtype(parser)
    add_overwrite(parser, "OUT")
    add_quiet(parser, "summary")
    parser.set_defaults(run=_merge, resumes=True)


def _merge(options: argparse.Namespace) -> None:
    ranks = Ranks.of_environment()
    quiet = options.quiet or not ranks.is_main
    begin = time.perf_counter()
    with byte_bar("merge", not quiet) as progress:
        done = merge(
            options.base,
            options.adapter,
            options.out,
            dtype=dtype_of(options),
            overwrite=options.overwrite,
            sync=options.sync,
            progress=progress,
            ranks=ranks,
        )
    if not quiet:
        seconds = time.perf_counter() - begin
        replaced = f", {done.replaced} tensors replaced" if done.replaced else ""
        print(
            f"{options.out}: {done.layers} layers merged{replaced} "
            f"({done.size / 1e9:.2f} GB in {seconds:.1f} s)"
        )
        if done.assumption:
            print(done.assumption)
