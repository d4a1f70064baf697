"""A folder that is written with a journal, so that a repeated run continues a killed one.

A hidden folder inside it holds the journal and the files that are not complete yet. The journal's
first line is the task: the arguments and the inputs. Each further line names a shard that is
complete and in its place.

If several ranks write the folder together, each has its own journal and its own shards. Rank 0
removes or completes the folder. A repeated run takes over the shards of all journals, so that it
may have another number of ranks.

Like `cp`, nothing here waits for the disk: the system still writes what a killed process has handed
to it. If the system itself crashed, which the journal detects, the run starts over.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from ...._utils.model_files import JOURNAL_FOLDER, is_unfinished
from ..disk import check_space, sync, try_lock
from ..pipeline import Shard
from .lines import Record, boot, difference, read_lines, write_line
from .meeting import Meeting
from .ranks import ALONE, Ranks, shares

_JOURNAL = "journal.jsonl"  # the journal of one process, or of rank 0
_OTHER = "journal-{rank}-{key}.jsonl"  # the journal of another rank
_CLOSED = -1  # in place of a file descriptor
_FINISHED = "finished"  # the name of a shard, or None when everything is done
_RUN = "run"  # the number of the run: of two records of one shard, the later run's is used
# Files without which a folder is not a model or an adapter.
_COMPLETING = ("config.json", "model.safetensors.index.json", "adapter_config.json",
               "adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # fmt: skip


class JournaledFolder:
    """The folder `out`: a context manager that locks it against other processes.

    A ValueError or TypeError inside the context removes what was written. After any other error,
    the same task can be continued. An error on one of several ranks is raised on all of them.

    Args:
        out: made if it does not exist.
        task: the arguments of the run.
        inputs: the `identity` of each input file by name.
        overwrite: whether to replace the model or adapter in it, and to discard another run's work.
        sync: whether all other files must be on the disk before the last one is written, which
            completes the folder as a model or adapter.
        ranks: the processes that write the folder together; each calls the same methods.

    Attributes:
        finished: the records of finished shards, including those of earlier runs of this task; on
            ranks other than 0, only their own.
        completed: whether everything is done except removing the journal.

    Raises:
        FileExistsError: the folder is not empty, or has the journal of another task.
        BlockingIOError: another process is writing the folder.
        ValueError: the ranks have different tasks.
        TimeoutError: some ranks did not start.
        ConnectionAbortedError: a rank ended without an error.

    """

    def __init__(
        self,
        out: Path,
        task: Mapping[str, Any],
        inputs: Mapping[str, str],
        overwrite: bool = False,
        sync: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.out, self.work = out, out / JOURNAL_FOLDER
        self.finished: dict[str, Record] = {}
        self.completed = False
        head = {"task": dict(task), "inputs": dict(inputs), "boot": boot()}
        self._head = json.loads(json.dumps(head))  # as the journal will return it
        self._overwrite, self._sync = overwrite, sync
        self._journal = _CLOSED
        self._ranks = ranks
        self._meeting = Meeting(out, self.work / "ranks", ranks)
        self._boots = {self._head["boot"]}  # of all ranks' machines
        self._run = 1
        self._runs: dict[str, int] = {}  # {name of a shard: the run that finished it}
        self._owners: Mapping[str, int] = {}

    def __enter__(self) -> JournaledFolder:
        try:
            if self._ranks.is_main:
                self._open()
            else:
                refuse, lock = self._check_writable, self.work / _JOURNAL
                self._meeting.join({"head": self._head}, refuse, lock)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                self._fail(error)
        finally:
            self._close()

    def path(self, name: str) -> Path:
        """Where a file is written before it is complete."""
        return self.work / name

    def remaining(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards that are not finished: those in no journal, or not in their place. Raises
        OSError if the disk has no space for them.

        With several ranks, rank 0 divides these shards among all ranks.
        """
        if not self._ranks.is_main:
            plan = self._meeting.wait_for_plan()
            self._owners, self._run = plan["owners"], plan[_RUN]
            self._begin_journal(_OTHER.format(rank=self._ranks.rank, key=uuid4().hex))
            return [shard for shard in shards if shard.name in self._owners]
        found = [shard for shard in shards if not self._has(shard)]
        written = [shard.target_layout.file_size for shard in found if shard.target is not None]
        check_space(self.out, sum(written))
        self._owners = shares({shard.name: shard.size for shard in found}, self._ranks.world_size)
        self._meeting.tell_plan({"owners": self._owners, _RUN: self._run})
        return found

    def share(self, remaining: Sequence[Shard]) -> list[Shard]:
        """The remaining shards that this rank rewrites."""
        return [shard for shard in remaining if self._owners[shard.name] == self._ranks.rank]

    def watched(self, advanced: Callable[[int], None]) -> Callable[[int], None]:
        """`advanced` with a check of the other ranks. The result is called during work, and raises
        the error of a rank that failed.
        """

        def watching(count: int) -> None:
            self._meeting.watch()
            advanced(count)

        return watching

    def gathered(self) -> bool:
        """Call this when this rank's shards are finished. On rank 0 it waits until all ranks are
        done and returns True: rank 0 then completes the folder. On the other ranks it returns
        False.
        """
        if not self._ranks.is_main:
            self._meeting.tell_done()
            return False
        self._meeting.wait_until_done()
        self._take_others()
        return True

    def finish(self, name: str, record: Record, in_place: bool = True) -> None:
        """Moves a complete file to its place (`in_place`), and records it in the journal."""
        if in_place:
            self.place(name, name)
        write_line(self._journal, {_FINISHED: name, _RUN: self._run} | record)
        self.finished[name], self._runs[name] = record, self._run

    def put(self, name: str | Path, content: bytes) -> None:
        """Writes a small file and moves it to its place."""
        self.path("content").write_bytes(content)
        self.place("content", name)

    def place(self, staged: str, name: str | Path) -> None:
        """Moves a complete file to its place."""
        target = self.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path(staged).replace(target)

    def settle(self) -> None:
        """Waits until all files are on the disk, if `sync` was given."""
        if self._sync:
            for folder, _, names in os.walk(self.out):
                for name in (*names, "."):
                    sync(Path(folder) / name)

    def complete(self) -> None:
        """Removes the journal, which completes the folder. The other ranks wait for rank 0."""
        if not self._ranks.is_main:
            self._meeting.wait_until_done()
            return
        if not self.completed:
            write_line(self._journal, {_FINISHED: None})
        self._meeting.tell_done()
        self._meeting.wait_until_alone()
        self._clear()
        (self.work / _JOURNAL).unlink()
        self.work.rmdir()
        self.settle()

    def _check_writable(self) -> bool:
        """Whether the folder has no unfinished run; raises an OSError if it must not be written."""
        if self.out.exists() and not self.out.is_dir():
            raise FileExistsError(f"{self.out} is a file: give a folder to write into")
        names = {entry.name for entry in self.out.iterdir()} if self.out.exists() else set()
        new = not is_unfinished(self.out)  # after reading the names: rank 0 may begin in between
        if new and not self._overwrite and names - {JOURNAL_FOLDER}:
            raise FileExistsError(f"{self.out} is not empty: give another folder, or --overwrite")
        return new

    def _open(self) -> None:
        """Locks the folder, meets the other ranks, and starts or resumes the run."""
        new, existed = self._check_writable(), self.out.exists()
        self.work.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._journal = os.open(self.work / _JOURNAL, flags, 0o666)
        if not _lock(self._journal):
            raise BlockingIOError(f"another process is writing {self.out}")
        try:
            self._meeting.open()
            self._meet(self._meeting.gather())
            if not self._resumed():
                self._start()
        except BaseException as error:
            self._meeting.fail(error)
            if new:
                shutil.rmtree(self.work, ignore_errors=True)
            if not existed:
                with suppress(OSError):  # the folder is not empty
                    self.out.rmdir()
            raise

    def _meet(self, others: Collection[Mapping[str, Any]]) -> None:
        """Raises ValueError if another rank has another task."""
        for rank, about in enumerate(others, start=1):
            head = about["head"]
            self._boots.add(head["boot"])
            if head | {"boot": self._head["boot"]} != self._head:
                raise ValueError(
                    f"rank {rank} differs from rank 0 in {difference(self._head, head)}: start all "
                    "ranks with the same arguments"
                )

    def _has(self, shard: Shard) -> bool:
        if shard.name not in self.finished:
            return False
        if shard.target is None:
            return True
        file = self.out / shard.name
        return file.is_file() and file.stat().st_size == shard.target_layout.file_size

    def _resumed(self) -> bool:
        """Whether the journal belongs to this task. `finished` then has its records and those of
        the other ranks.
        """
        lines, size = read_lines(self.work / _JOURNAL)
        if not lines:
            return False
        started = lines[1:] or any(other[1:] for other in self._others())
        head = self._head | {"boot": lines[0].get("boot")}
        if lines[0] != head and started and not self._overwrite:
            raise FileExistsError(
                f"{self.out} has an unfinished run that differs in "
                f"{difference(self._head, lines[0])}: repeat it as it was, or give --overwrite to "
                "start over"
            )
        if lines[0] != self._head:
            return False
        os.ftruncate(self._journal, size)
        self._take(lines[1:])
        self._take_others()
        runs = (line.get(_RUN, 0) for other in (lines, *self._others()) for line in other)
        self._run = 1 + max(runs, default=0)
        return True

    def _others(self) -> Iterator[list[Record]]:
        """The lines of each journal that another rank wrote."""
        for file in sorted(self.work.glob(_OTHER.format(rank="*", key="*"))):
            yield read_lines(file)[0]

    def _take_others(self) -> None:
        """Takes over other ranks' finished shards, if their machines have not rebooted since."""
        for lines in self._others():
            if any(lines[:1] == [self._head | {"boot": boot}] for boot in self._boots):
                self._take(lines[1:])

    def _take(self, records: Sequence[Record]) -> None:
        """Takes over a journal's records, except of shards that a later run has finished again."""
        for line in records:
            name, run = line[_FINISHED], line.get(_RUN, 0)
            if name is None:
                self.completed = True
            elif run >= self._runs.get(name, 0):
                self.finished[name] = {k: v for k, v in line.items() if k not in (_FINISHED, _RUN)}
                self._runs[name] = run

    def _start(self) -> None:
        os.ftruncate(self._journal, 0)
        self._clear(self._meeting.folder)
        if self._overwrite:
            self._remove_outputs()
        write_line(self._journal, self._head)

    def _clear(self, *kept: Path) -> None:
        """Removes the files that are not in place yet, and the other ranks' journals."""
        for entry in self.work.iterdir():
            if entry.is_dir() and entry not in kept:
                shutil.rmtree(entry)
            elif entry.name != _JOURNAL and entry not in kept:
                entry.unlink()

    def _begin_journal(self, name: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_EXCL
        self._journal = os.open(self.work / name, flags, 0o666)
        write_line(self._journal, self._head)

    def _remove_outputs(self) -> None:
        """Removes a model or an adapter; the files that complete the folder go first."""
        for name in _COMPLETING:
            (self.out / name).unlink(missing_ok=True)
        for file in self.out.glob("*.safetensors"):
            file.unlink()

    def _fail(self, error: BaseException) -> None:
        """Tells the other ranks about an error. Rank 0 removes what was written if a repeated run
        would fail again. Raises the error that all ranks raise, if it is another one.
        """
        told = self._meeting.fail(error)
        if self._ranks.is_main and isinstance(told, (ValueError, TypeError)):
            self._abandon()
        if told is not error:
            raise told from error

    def _abandon(self) -> None:
        """Removes everything that was written."""
        self._take_others()
        for name in self.finished:
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.work)
        with suppress(OSError):  # the folder is not empty
            self.out.rmdir()

    def _close(self) -> None:
        self._meeting.close()
        if self._journal != _CLOSED:
            os.close(self._journal)
            self._journal = _CLOSED


def _lock(descriptor: int) -> bool:
    """Locks the journal. A rank that checks who holds the lock may itself hold it for a moment."""
    for _ in range(4):
        if try_lock(descriptor):
            return True
        time.sleep(0.02)
    return False
