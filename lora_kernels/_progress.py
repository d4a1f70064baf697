"""A progress bar for loops that take long, where rich is installed and somebody is looking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], description: str, enabled: bool = True) -> Iterator[T]:
    """The items, with a bar on standard error if that is a terminal."""
    if not enabled or find_spec("rich") is None:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    total = len(items) if isinstance(items, Sized) else None
    yield from track(
        items, description, total, console=console, disable=not console.is_terminal, transient=True
    )
