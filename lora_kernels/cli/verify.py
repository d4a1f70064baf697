"""`lora-kernels verify`: checks that an adapter loads onto a model and computes what it should."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .._utils.errors import needed
from ._options import Commands, add_command, add_path, table_console

_DESCRIPTION = """\
Checks an adapter against its base: whether its files are intact; whether every layer is in the
base, with the same shape; and, if transformers is installed, whether the logits of the merged
weights, of lora_kernels and of PEFT agree, in float32 on the CPU on a few fixed tokens.

The exit status is 0 if no check fails, else 1.
"""
_EXAMPLES = """\
examples:
  lora-kernels verify adapter models/SmolLM2-135M
  lora-kernels verify adapter models/Llama-3-70B --files-only
"""


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands, "verify", "check an adapter against its base", _DESCRIPTION, _EXAMPLES
    )
    add_path(parser, "ADAPTER", "folder of an adapter, written by PEFT or lora_kernels")
    add_path(parser, "BASE", "folder of the model")
    parser.add_argument(
        "--files-only", action="store_true", help="do not load the model: no logits"
    )
    parser.add_argument("--quiet", action="store_true", help="print no table: only the exit status")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from ..files.checkpoint.verify import verify

    console = None if options.quiet else table_console()
    # transformers reads these variables when it is first imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with quiet_packages():
        checks = list(verify(options.adapter, options.base, logits=not options.files_only))
    if console:
        table = needed("rich.table", "the table", "cli").Table(show_header=False)
        words = {True: "ok", False: "WRONG", None: "skipped"}
        for check in checks:
            table.add_row(words[check.passed], check.name, check.detail)
        console.print(table, markup=False)
    return int(any(check.passed is False for check in checks))


@contextmanager
def quiet_packages() -> Iterator[None]:
    """Hides logs and warnings of other packages, which do not concern the adapter."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"transformers|torch|torchao|peft")
            yield
    finally:
        logging.disable(logging.NOTSET)
