"""The command `lora-kernels`: a module for each subcommand, with its parser and its function."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch import OutOfMemoryError

from .._utils.errors import MissingExtraError
from .._utils.version import __version__
from . import check, convert, env, init, inspect, merge, suggest, verify

__all__ = ["main"]

_EXAMPLES = """\
from a checkpoint to a trained adapter:
  lora-kernels init models/base start --method loram -r 16
  (train start/adapter on the model in start, with PEFT or TRL, into trained)
  lora-kernels convert trained adapter --start start/adapter
  lora-kernels verify adapter models/base
  lora-kernels check adapter --base models/base --for vllm,sglang
  lora-kernels merge models/base adapter merged
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0; 1 after an error (one line on standard error),
    or if `verify` or `check` finds one; 130 after Ctrl-C. After wrong usage, argparse exits with 2.
    """
    options = argument_parser().parse_args(argv)
    try:
        return options.run(options) or 0
    except (ValueError, TypeError, OSError, MissingExtraError, OutOfMemoryError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"lora-kernels {options.command}: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if options.resumes:
            message = "interrupted; repeat the same command to continue"
            print(f"lora-kernels {options.command}: {message}", file=sys.stderr)
        return 130


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lora-kernels",
        description="Tools for low-rank adaptation.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.set_defaults(resumes=False)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for module in (init, merge, convert, verify, check, inspect, suggest, env):
        module.add_parser(commands)
    return parser
