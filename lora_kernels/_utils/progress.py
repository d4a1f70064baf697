"""Progress bars on standard error, if rich is installed and standard error is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

T = TypeVar("T")
# Takes the total number of bytes; returns a function to call with each number of bytes completed.
ByteCounter = Callable[[int], Callable[[int], None]]


def tracked(items: Iterable[T], description: str, enabled: bool = True) -> Iterator[T]:
    """The items, with a progress bar."""
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


def uncounted(total: int) -> Callable[[int], None]:
    """A `ByteCounter` without a bar."""
    return lambda count: None


@contextmanager
def byte_bar(description: str, enabled: bool = True) -> Iterator[ByteCounter]:
    """A bar with bytes, bytes per second and the time left; it may be advanced by any thread."""
    if not enabled or find_spec("rich") is None:
        yield uncounted
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(description, total=None)

        def begin(total: int) -> Callable[[int], None]:
            bar.update(task, total=total)
            return lambda count: bar.advance(task, count)

        yield begin
