"""Options that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .._utils.errors import needed
from .._utils.names import ALL_LINEAR

if TYPE_CHECKING:
    import torch
    from rich.console import Console

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DTYPES = ("float32", "bfloat16", "float16")


def add_command(
    commands: Commands, name: str, help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Adds a parser whose texts keep their line breaks."""
    return commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_path(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    """Adds a positional path. The help shows `name`; the attribute is `name` in lower case."""
    parser.add_argument(name.lower(), type=Path, metavar=name, help=help)


def add_start(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Adds the options for a start and its rank; the command supports the starts in `names`."""
    parser.add_argument(
        "--method",
        default="loram",
        metavar="NAME",
        help=f"the start: {', '.join(names)} (default loram)",
    )
    parser.add_argument("-r", type=int, default=16, metavar="R", help="rank (default 16)")


def add_targets(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--targets",
        nargs="+",
        default=[ALL_LINEAR],
        metavar="NAME",
        help="layers, by their names or last parts (default all-linear: all except embeddings and "
        "output heads)",
    )


def targets_of(options: argparse.Namespace) -> str | list[str]:
    return ALL_LINEAR if options.targets == [ALL_LINEAR] else options.targets


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="cast all floats of 16 bits and more (default: every tensor keeps its dtype)",
    )


def dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    import torch

    return None if options.dtype is None else getattr(torch, options.dtype)


def add_overwrite(parser: argparse.ArgumentParser, folder: str) -> None:
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=f"replace the model or adapter in {folder}, or start an unfinished run over",
    )
    parser.add_argument(
        "--sync",
        action="store_true",
        help=f"complete {folder} only when its files are on the disk, for power failures (slower)",
    )


def add_quiet(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--quiet", action="store_true", help=f"print no {what} and no progress bar")


RANKS = """\
Under torchrun, or with its variables RANK and WORLD_SIZE in the environment, several processes work
together. Each writes its own files; rank 0 completes the folder and prints. The result has the same
bytes as with one process. If a process fails, ends early or has not begun after 60 s, all fail;
repeat the command with any number of processes to continue. torchrun sets OMP_NUM_THREADS to 1: set
it to the number of cores for each process.
"""


def table_console() -> Console:
    """A console for tables that does not break their lines in a pipe or a file."""
    rich = needed("rich.console", "the table", "cli")
    console = rich.Console()
    return console if console.is_terminal else rich.Console(width=200)
