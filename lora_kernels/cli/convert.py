"""`lora-kernels convert`: an adapter in another format, or of the original base."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files.adapter.recipe import FORMATS
from ..files.checkpoint.convert import convert
from ._options import add_command, add_path, add_quiet

_DESCRIPTION = """\
Writes an adapter in another format.

peft (the default): PEFT and serving engines load it on the original model. A start that was taken
out of the base doubles the rank, unless --compress-to cuts it again. native: what lora_kernels
trains, with the start apart.

--start: ADAPTER was trained with PEFT on the model that `lora-kernels init` made, and START is the
folder "adapter" in that model, the start as it was. The result holds for the original model.
"""
_EXAMPLES = """\
examples:
  lora-kernels convert trained adapter --start start/adapter
  lora-kernels convert trained adapter --start start/adapter --compress-to 16
  lora-kernels convert runs/native adapter --format peft
"""


def add_parser(commands) -> None:
    """The subcommand's."""
    parser = add_command(
        commands, "convert", "write an adapter in another format", _DESCRIPTION, _EXAMPLES
    )
    add_path(parser, "ADAPTER", "folder of an adapter that PEFT or lora_kernels wrote")
    add_path(parser, "OUT", "folder to write; an adapter in it is replaced")
    parser.add_argument("--format", choices=FORMATS, default="peft", help="default peft")
    parser.add_argument(
        "--compress-to",
        type=int,
        metavar="R",
        help="cut the rank to R, by an SVD of the change; prints what that loses",
    )
    parser.add_argument(
        "--start", type=Path, metavar="START", help="the start ADAPTER was trained from"
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
