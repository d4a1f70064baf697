"""`lora-kernels convert`: converts an adapter to another format, or to the original base."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files.adapter.peft_format.experts.layouts import LAYOUTS
from ..files.adapter.peft_format.experts.reading import ORDERS
from ..files.serving.convert import TARGETS, convert
from ._options import DTYPES, Commands, add_command, add_path, add_quiet

_DESCRIPTION = """\
Writes an adapter in another format, rank or dtype, or with other names.

--to peft (the default): PEFT and serving engines load the adapter onto the original model, all with
the same strength: s is multiplied into B, and all layers have one rank. A start that was subtracted
from the base doubles the rank, unless --compress-to truncates it. --to native: for lora_kernels, as
small as the training state. --to gguf: OUT is a file for llama.cpp and Ollama.

--start: ADAPTER was trained with PEFT on the model that `lora-kernels init` wrote, and START is the
folder "adapter" in that model, unchanged. Or PEFT itself has subtracted a start (init_lora_weights
"pissa", "olora", "corda" or "lora_ga"), and START is the adapter that PEFT saved before training.
The result is an adapter of the original model.

--rename: for a server whose class holds the text model elsewhere, so that the adapter's names
silently match nothing. `lora-kernels check` tells which prefix would match.
"""
_EXAMPLES = """\
examples:
  lora-kernels convert trained adapter --start start/adapter
  lora-kernels convert trained adapter --start start/adapter --compress-to 16 --dtype bfloat16
  lora-kernels convert runs/native adapter --to peft
  lora-kernels convert adapter adapter.gguf --to gguf --base models/Llama-3-8B
  lora-kernels convert adapter renamed --rename model. language_model.model.
  lora-kernels convert adapter stacked --experts stacked --base models/Qwen3-30B-A3B
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands, "convert", "write an adapter in another format", _DESCRIPTION, _EXAMPLES
    )
    add_path(parser, "ADAPTER", "folder of an adapter, written by PEFT or lora_kernels")
    add_path(parser, "OUT", "folder to write, or file (gguf); an adapter in it is replaced")
    parser.add_argument(
        "--to", "--format", dest="format", choices=TARGETS, default="peft", help="default peft"
    )
    parser.add_argument(
        "--compress-to",
        type=int,
        metavar="R",
        help="truncate the rank to R, by an SVD of the update; prints the error",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="round the tensors (default: they keep their dtype)"
    )
    parser.add_argument(
        "--start", type=Path, metavar="START", help="the start that ADAPTER was trained from"
    )
    parser.add_argument(
        "--rename",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="replace the prefix OLD of the layers' names by NEW",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="BASE",
        help="folder of the model, or for gguf its config.json (default: the base that ADAPTER "
        "names, if it is a folder)",
    )
    parser.add_argument(
        "--experts",
        choices=LAYOUTS,
        default="auto",
        help="with --to peft, store experts as a pair of matrices for each, with the names "
        "in BASE's files, or stacked as PEFT does (default auto: what suits the model)",
    )
    parser.add_argument(
        "--expert-order",
        choices=ORDERS,
        default="auto",
        help="slowest for experts that Unsloth wrote before September 2026 (default auto: "
        "as its configuration says, else as PEFT writes them)",
    )
    add_quiet(parser, "summary")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    saved = convert(
        options.adapter,
        options.out,
        format=options.format,
        compress_to=options.compress_to,
        dtype=options.dtype,
        start=options.start,
        rename=None if options.rename is None else tuple(options.rename),
        base=options.base,
        experts=options.experts,
        expert_order=options.expert_order,
    )
    if not options.quiet:
        print(saved)
