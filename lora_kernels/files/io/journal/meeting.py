"""How the ranks of a run find each other and learn about each other's ends and errors: by files.

Each rank holds the lock of a file that is named after its number. The other ranks find the file
unlocked when the rank has ended, however it ended. A rank's messages are files that are named after
its key, a random number, so that no rank takes an earlier run's file for a message of this run.

Rank 0 waits for all other ranks and then publishes the plan. A rank that fails publishes its error.
Rank 0 then fails too, and all ranks raise the error that rank 0 publishes.
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
JOIN = 60.0  # seconds that a rank waits for others to begin, counted from the last one that did
_LEAVE = 10.0  # seconds that a run waits for ranks of an earlier run whose rank 0 has ended
_POLL = 0.05  # seconds between two checks
_WATCH = 0.2  # seconds between two checks during work
_PLAN = "plan"
_ABOUT, _DONE, _FAILED = "about", "done", "failed"
# Errors that all ranks raise with the same type; any other error becomes an OSError there.
_KINDS: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, FileExistsError, FileNotFoundError, BlockingIOError),
    *(TimeoutError, ConnectionAbortedError, OSError),
)
_AGAIN = "repeat the same command to continue"

Message = dict[str, Any]


class Meeting:
    """The ranks that write the folder `out`, and their files in `folder`.

    With one process, nothing is written and nothing waits.
    """

    def __init__(self, out: Path, folder: Path, ranks: Ranks) -> None:
        self._out, self.folder, self._ranks = out, folder, ranks
        self._key = uuid4().hex
        self._keys: dict[int, str] = {}  # of the other ranks that this rank has found
        self._lock = _CLOSED
        self._next_look = 0.0

    def open(self) -> None:
        """Begins the meeting. For rank 0, which has locked the folder.

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
        """For rank 0: waits for all other ranks; returns the message of each when it joined.

        Raises:
            TimeoutError: some ranks did not come.
            OSError: a rank came and has ended.

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
        """For the other ranks: waits for rank 0 and joins it. `refuse` raises an error if the
        folder cannot be written; `lock` is the file that rank 0, or another run, has locked.

        Raises:
            BlockingIOError: another run is writing the folder.
            TimeoutError: rank 0 did not come.

        """
        begin = time.monotonic()
        while (key := self._key_of(0)) is None:
            refuse()
            waited = time.monotonic() - begin
            # By now rank 0 would have opened its meeting.
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
        """For rank 0: lets the other ranks begin."""
        if self._keys:
            self._write(_PLAN, plan | {"keys": list(self._keys.values())})

    def wait_for_plan(self) -> Message:
        """For the other ranks: waits for rank 0's plan for all ranks."""
        while True:
            plan = self._read(_PLAN)
            if plan is not None and self._key in plan["keys"]:
                return plan
            self._check(0)
            time.sleep(_POLL)

    def watch(self) -> None:
        """Called often during work: raises the error of another rank that failed or ended."""
        if self._keys and (now := time.monotonic()) > self._next_look:
            self._next_look = now + _WATCH
            self._check_others()

    def tell_done(self) -> None:
        """Says that this rank has done its part; on rank 0, that everything is done."""
        if self._keys:
            self._write(f"{self._key}.{_DONE}", {})

    def wait_until_done(self) -> None:
        """Waits until all ranks that this rank knows are done; raises the error of a rank that
        failed or ended.
        """
        while not self._check_others():
            time.sleep(_POLL)

    def wait_until_alone(self) -> None:
        """For rank 0: waits until the other ranks have ended."""
        while any(self._key_of(rank) == key for rank, key in self._keys.items()):
            time.sleep(_POLL)

    def fail(self, error: BaseException) -> BaseException:
        """Publishes this rank's error, and returns the error that all ranks raise. Rank 0 waits
        until the other ranks have ended.
        """
        if not self._keys or not self.folder.is_dir():
            return error
        wait = isinstance(error, Exception)  # not after Ctrl-C
        text = str(error) if wait else f"rank {self._rank} was interrupted: {_AGAIN}"
        kind = next((kind for kind in _KINDS if isinstance(error, kind)), OSError)
        message = {"kind": kind.__name__, "text": text or type(error).__name__}
        try:
            self._write(f"{self._key}.{_FAILED}", message)
        except OSError:  # a full disk: the other ranks will see that this rank has ended
            return error
        if self._ranks.is_main and wait:
            self.wait_until_alone()
        elif isinstance(error, (ValueError, TypeError, OSError)):  # others have a traceback
            told = self._wait_for_error()
            if told is not None and str(told) != str(error):
                return told
        return error

    def close(self) -> None:
        """Leaves the meeting: the other ranks then see that this rank has ended."""
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
        """Creates this rank's file; others see it only when it is locked and has its key."""
        self.folder.mkdir(exist_ok=True)
        self._write(f"{self._key}.{_ABOUT}", about | {"launch": self._launch()})
        staged = self.folder / f"{self._key}.lock"
        self._lock = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try_lock(self._lock)
        os.write(self._lock, self._key.encode())
        staged.replace(self.folder / str(self._rank))

    def _key_of(self, rank: int) -> str | None:
        """The key of a rank that has joined and has not ended; else None."""
        try:
            with (self.folder / str(rank)).open() as file:
                return file.read() if is_locked(file.fileno()) else None
        except FileNotFoundError:
            return None

    def _check_others(self) -> bool:
        """Whether all ranks that this rank knows are done (see `_check`)."""
        return all([self._check(rank) for rank in self._keys])

    def _check(self, rank: int) -> bool:
        """Whether a rank is done; raises its error, or an OSError if it ended too early."""
        here = self._key_of(rank) == self._keys[rank]  # first: a rank writes, then ends
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
        """The error that a rank published; None if there is none."""
        message = self._read(f"{self._keys[rank]}.{_FAILED}")
        if message is None:
            return None
        kind = next(kind for kind in _KINDS if kind.__name__ == message["kind"])
        return kind(message["text"])

    def _wait_for_error(self) -> Exception | None:
        """The error that rank 0 publishes; None if it ends without one."""
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
        """Writes a message; the other ranks see all of it or nothing."""
        staged = self.folder / f"{self._key}.message"
        staged.write_text(json.dumps(message))
        staged.replace(self.folder / name)


_START = (
    "Start all ranks at the same time, with torchrun, or unset RANK and WORLD_SIZE for one process"
)


def _held(file: Path) -> bool:
    """Whether a process has locked the file."""
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
