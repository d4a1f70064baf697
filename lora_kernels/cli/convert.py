"""`lora-kernels convert`: converts an adapter to another format, or to the original base."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files.adapter.recipe import FORMATS
from ..files.checkpoint.convert import convert
from ._options import Commands, add_command, add_path, add_quiet

_DESCRIPTION = """\
Writes an adapter in another format.

peft (the default): PEFT and serving engines load it onto the original model. A start that was
subtracted from the base doubles the rank, unless --compress-to truncates it. native: for
lora_kernels, as small as the training state.

--start: ADAPTER was trained with PEFT on the model that `lora-kernels init` wrote, and START is the
folder "adapter" in that model, unchanged. The result is an adapter of the original model.
"""
_EXAMPLES = """\
examples:
  lora-kernels convert trained adapter --start start/adapter
  lora-kernels convert trained adapter --start start/adapter --compress-to 16
  lora-kernels convert runs/native adapter --format peft
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands, "convert", "write an adapter in another format", _DESCRIPTION, _EXAMPLES
    )
    add_path(parser, "ADAPTER", "folder of an adapter, written by PEFT or lora_kernels")
    add_path(parser, "OUT", "folder to write; an adapter in it is replaced")
    parser.add_argument("--format", choices=FORMATS, default="peft", help="default peft")
    parser.add_argument(
        "--compress-to",
        type=int,
        metavar="R",
        help="truncate the rank to R, by an SVD of the update; prints the error",
    )
    parser.add_argument(
        "--start", type=Path, metavar="START", help="the start that ADAPTER was trained from"
    )
    add_quiet(parser, "summary")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    saved = convert(
        options.adapter,
        options.out,
        format=options.format,
        compress_to=options.compress_to,
        start=options.start,
    )
    if not options.quiet:
        print(saved)
