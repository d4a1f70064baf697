"""How the ranks of a run find each other, and learn what becomes of each other: by files.

Each rank holds the lock of a file that is named by its number, and which others find free when the
rank has ended, however it ended. What a rank tells lies in files that are named by its key, a
random number: nothing that an earlier run has left is taken for a message of this one.

Rank 0 waits for all others, and then tells the plan. When a rank fails, it tells so. Rank 0 then
fails, too, and the error that it tells is the one that all ranks raise.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..disk import is_locked, release, try_lock
from .ranks import Ranks

_CLOSED = -1  # in place of a file descriptor
JOIN = 60.0  # seconds that a rank waits for the others to begin, from the last one that did
_LEAVE = 10.0  # seconds that a run waits for ranks of an earlier one, whose rank 0 has ended
_POLL = 0.05  # seconds between two looks
_WATCH = 0.2  # the same, during work
_PLAN = "plan"
_ABOUT, _DONE, _FAILED = "about", "done", "failed"
# The errors that are raised on all ranks; any other becomes an OSError there.
_KINDS: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, FileExistsError, FileNotFoundError, BlockingIOError),
    *(TimeoutError, ConnectionAbortedError, OSError),
)
_AGAIN = "repeat the same command to continue"

Message = dict[str, Any]


class Meeting:
    """The ranks that write the folder `out`, and their files in `folder`.

    With one process, nothing is written, and nothing is waited for.
    """

    def __init__(self, out: Path, folder: Path, ranks: Ranks) -> None:
        self._out, self.folder, self._ranks = out, folder, ranks
        self._key = uuid4().hex
        self._keys: dict[int, str] = {}  # of the other ranks that this one knows
        self._lock = _CLOSED
        self._next_look = 0.0

    def open(self) -> None:
        """Rank 0, which has locked the folder: begins the meeting.

        Raises:
            BlockingIOError: ranks of an earlier run do not end.

        """
        deadline = time.monotonic() + _LEAVE
        while self.folder.is_dir() and any(map(_held, self.folder.iterdir())):
            if time.monotonic() > deadline:
                raise _in_use(self._out)
            time.sleep(_POLL)
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        if self._ranks.world_size > 1:
            self._enter({})

    def gather(self) -> list[Message]:
        """Rank 0: waits for all other ranks; returns what each told when it joined.

        Raises:
            TimeoutError: some did not come.
            OSError: one has ended again.

        """
        found: dict[int, Message] = {}
        deadline = time.monotonic() + JOIN
        while missing := sorted(set(self._others()) - found.keys()):
            for rank in missing:
                if (key := self._key_of(rank)) is not None:
                    self._keys[rank] = key
                    found[rank] = self._read(f"{key}.{_ABOUT}") or {}
                    deadline = time.monotonic() + JOIN
            self._check_others()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"of {self._ranks.world_size} ranks, {_listed(missing)} did not begin to write "
                    f"{self._out} within {JOIN:.0f} s. {_START}"
                )
            time.sleep(_POLL)
        return [found[rank] for rank in self._others()]

    def join(self, about: Message, refuse: Callable[[], object], lock: Path) -> None:
        """The other ranks: wait for rank 0 and join it. `refuse` raises if the folder cannot be
        written; `lock` is the file that rank 0, or another run, has locked.

        Raises:
            BlockingIOError: another run is writing the folder.
            TimeoutError: rank 0 did not come.

        """
        begin = time.monotonic()
        while (key := self._key_of(0)) is None:
            refuse()
            waited = time.monotonic() - begin
            # Rank 0 would have opened its meeting by now.
            if waited > 2 * _LEAVE and _held(lock):
                raise _in_use(self._out)
            if waited > JOIN:
                raise TimeoutError(
                    f"rank 0 of {self._ranks.world_size} did not begin to write {self._out} within "
                    f"{JOIN:.0f} s. {_START}"
                )
            time.sleep(_POLL)
        main = self._read(f"{key}.{_ABOUT}")
        if main is None or main["launch"] != self._launch() or self._key_of(self._rank) is not None:
            raise _in_use(self._out)
        self._keys[0] = key
        self._enter(about)

    def tell_plan(self, plan: Message) -> None:
        """Rank 0: lets the others begin."""
        if self._keys:
            self._write(_PLAN, plan | {"keys": list(self._keys.values())})

    def wait_for_plan(self) -> Message:
        """The other ranks: what rank 0 tells all of them."""
        while True:
            plan = self._read(_PLAN)
            if plan is not None and self._key in plan["keys"]:
                return plan
            self._check(0)
            time.sleep(_POLL)

    def watch(self) -> None:
        """Called often during work: raises the error of another rank if it failed or has ended."""
        if self._keys and (now := time.monotonic()) > self._next_look:
            self._next_look = now + _WATCH
            self._check_others()

    def tell_done(self) -> None:
        """Tells that this rank has done its part; rank 0, that everything is done."""
        if self._keys:
            self._write(f"{self._key}.{_DONE}", {})

    def wait_until_done(self) -> None:
        """Waits until all ranks that this one knows are done; raises the error of one that failed
        or has ended.
        """
        while not self._check_others():
            time.sleep(_POLL)

    def wait_until_alone(self) -> None:
        """Rank 0: waits until the other ranks have ended."""
        while any(self._key_of(rank) == key for rank, key in self._keys.items()):
            time.sleep(_POLL)

    def fail(self, error: BaseException) -> BaseException:
        """Tells of this rank's error, and returns the error that all ranks raise; rank 0 waits
        until they have ended.
        """
        if not self._keys or not self.folder.is_dir():
            return error
        wait = isinstance(error, Exception)  # none after Ctrl-C
        text = str(error) if wait else f"rank {self._rank} was interrupted: {_AGAIN}"
        kind = next((kind for kind in _KINDS if isinstance(error, kind)), OSError)
        message = {"kind": kind.__name__, "text": text or type(error).__name__}
        try:
            self._write(f"{self._key}.{_FAILED}", message)
        except OSError:  # a full disk: the others see that this rank has ended
            return error
        if self._ranks.is_main and wait:
            self.wait_until_alone()
        elif isinstance(error, (ValueError, TypeError, OSError)):  # others have a traceback
            told = self._wait_for_error()
            if told is not None and str(told) != str(error):
                return told
        return error

    def close(self) -> None:
        """Leaves the meeting: for the others this rank has ended."""
        if self._lock != _CLOSED:
            release(self._lock)
            self._lock = _CLOSED

    @property
    def _rank(self) -> int:
        return self._ranks.rank

    def _others(self) -> Iterator[int]:
        return (rank for rank in range(self._ranks.world_size) if rank != self._rank)

    def _launch(self) -> list[Any]:
        return [self._ranks.world_size, *self._ranks.launch]

    def _enter(self, about: Message) -> None:
        """Locks this rank's file, which others only see locked, and with its key in it."""
        self.folder.mkdir(exist_ok=True)
        self._write(f"{self._key}.{_ABOUT}", about | {"launch": self._launch()})
        staged = self.folder / f"{self._key}.lock"
        self._lock = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try_lock(self._lock)
        os.write(self._lock, self._key.encode())
        staged.replace(self.folder / str(self._rank))

    def _key_of(self, rank: int) -> str | None:
        """The key of a rank that has joined and not ended."""
        try:
            with (self.folder / str(rank)).open() as file:
                return file.read() if is_locked(file.fileno()) else None
        except FileNotFoundError:
            return None

    def _check_others(self) -> bool:
        """`_check` for all ranks that this one knows."""
        return all([self._check(rank) for rank in self._keys])

    def _check(self, rank: int) -> bool:
        """Whether a rank is done; raises its error, or an OSError if it has ended before."""
        here = self._key_of(rank) == self._keys[rank]  # first: a rank tells before it ends
        if (error := self._error_of(rank)) is not None:
            raise error
        if self._read(f"{self._keys[rank]}.{_DONE}") is not None:
            return True
        if not here:
            raise ConnectionAbortedError(
                f"rank {rank} of {self._ranks.world_size} ended before its part was done: {_AGAIN}"
            )
        return False

    def _error_of(self, rank: int) -> Exception | None:
        """The error that a rank told of."""
        message = self._read(f"{self._keys[rank]}.{_FAILED}")
        if message is None:
            return None
        kind = next(kind for kind in _KINDS if kind.__name__ == message["kind"])
        return kind(message["text"])

    def _wait_for_error(self) -> Exception | None:
        """The error that rank 0 tells; None if it ends without."""
        while True:
            here = self._key_of(0) == self._keys[0]
            if (error := self._error_of(0)) is not None or not here:
                return error
            time.sleep(_POLL)

    def _read(self, name: str) -> Message | None:
        try:
            content: Message = json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None
        return content

    def _write(self, name: str, message: Mapping[str, Any]) -> None:
        """Writes a message, which others see whole or not at all."""
        staged = self.folder / f"{self._key}.message"
        staged.write_text(json.dumps(message))
        staged.replace(self.folder / name)


_START = (
    "Start all ranks at the same time, with torchrun, or unset RANK and WORLD_SIZE for one process"
)


def _held(file: Path) -> bool:
    """Whether a process holds the lock of the file."""
    try:
        with file.open() as opened:
            return is_locked(opened.fileno())
    except FileNotFoundError:
        return False


def _in_use(out: Path) -> BlockingIOError:
    return BlockingIOError(f"another process is writing {out}")


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"{shown} ..." if len(ranks) > 8 else shown
