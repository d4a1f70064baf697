"""Options that several subcommands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._utils.extras import needed
from .._utils.names import ALL_LINEAR

DTYPES = ("float32", "bfloat16", "float16")


def add_command(commands, name: str, help: str, description: str, examples: str):
    """A parser whose texts keep their lines."""
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_path(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    """A positional path, shown as it is named."""
    parser.add_argument(name.lower(), type=Path, metavar=name, help=help)


def add_targets(parser: argparse.ArgumentParser) -> None:
    """Which layers."""
    parser.add_argument(
        "--targets",
        nargs="+",
        default=[ALL_LINEAR],
        metavar="NAME",
        help="layers, by their names or last parts (default all-linear: all but embeddings and "
        "output heads)",
    )


def targets_of(options: argparse.Namespace) -> str | list[str]:
    """What `add_targets` was given."""
    return ALL_LINEAR if options.targets == [ALL_LINEAR] else options.targets


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """The dtype of what is written."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="cast all floats of 16 bits and more (default: every tensor keeps its own)",
    )


def dtype_of(options: argparse.Namespace):
    """A `torch.dtype`, or None."""
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def add_overwrite(parser: argparse.ArgumentParser, folder: str) -> None:
    """What may happen to what is there."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace the model or adapter in {folder}, or start an unfinished run again",
    )
    parser.add_argument(
        "--sync",
        action="store_true",
        help=f"wait for the disk before {folder} is complete, against a loss of power (slower)",
    )


def add_quiet(parser: argparse.ArgumentParser, what: str) -> None:
    """Silence."""
    parser.add_argument("--quiet", action="store_true", help=f"no {what} and no progress bar")


def table_console():
    """As wide as its lines where nobody's terminal limits it: in a pipe or a file."""
    rich = needed("rich.console", "the table", "cli")
    console = rich.Console()
    return console if console.is_terminal else rich.Console(width=200)
