"""A folder that is written with a journal, so that a repeated run continues a killed one.

A hidden folder inside holds the files that are not complete yet, and the journal. The journal's
first line is the task: the arguments and the inputs. Each further line names a shard that is
complete and in its place.

Nothing waits for the disk, as `cp` does not: the system still writes what a killed process has
handed to it. If the system itself crashed, which the journal detects, the run starts over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._utils.model_files import JOURNAL_FOLDER, is_unfinished
from .disk import sync, try_lock

if TYPE_CHECKING:
    from .pipeline import Shard

_JOURNAL = "journal.jsonl"
_CLOSED = -1  # in place of a file descriptor
_FINISHED = "finished"  # the name of a shard, or None when everything is done
# Files without which a folder is not a model or an adapter.
_COMPLETING = ("config.json", "model.safetensors.index.json", "adapter_config.json",
               "adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # fmt: skip

Record = dict[str, Any]


def identity(file: Path) -> str:
    """Identifies the version of a file, by its size and the time of its last change."""
    status = file.stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


class JournaledFolder:
    """The folder `out`; a context manager, which locks it against other processes.

    A ValueError or TypeError inside the context removes what was written; after any other error the
    same task can be continued.

    Args:
        out: made if it does not exist.
        task: the arguments of the run.
        inputs: the `identity` of each input file by name.
        overwrite: whether the model or adapter in it is replaced, and another run's work discarded.
        sync: whether all other files have to reach the disk before the last one is written, without
            which the folder is not a model or adapter.

    Attributes:
        finished: the records of finished shards, those of an earlier run of this task included.
        completed: whether everything is done, apart from removing the journal.

    Raises:
        FileExistsError: the folder is not empty, or has the journal of another task.
        BlockingIOError: another process is writing it.

    """

    def __init__(
        self,
        out: Path,
        task: Mapping[str, Any],
        inputs: Mapping[str, str],
        overwrite: bool = False,
        sync: bool = False,
    ) -> None:
        self.out, self.work = out, out / JOURNAL_FOLDER
        self.finished: dict[str, Record] = {}
        self.completed = False
        head = {"task": dict(task), "inputs": dict(inputs), "boot": _boot()}
        self._head = json.loads(json.dumps(head))  # as it is read from the journal
        self._overwrite, self._sync = overwrite, sync
        self._journal = _CLOSED

    def __enter__(self) -> JournaledFolder:
        if self.out.exists() and not self.out.is_dir():
            raise FileExistsError(f"{self.out} is a file: give a folder to write into")
        new = not is_unfinished(self.out)
        if new and not self._overwrite and self.out.exists() and any(self.out.iterdir()):
            raise FileExistsError(f"{self.out} is not empty: give another folder, or --overwrite")
        self.work.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._journal = os.open(self.work / _JOURNAL, flags, 0o666)
        try:
            if not try_lock(self._journal):
                raise BlockingIOError(f"another process is writing {self.out}")
            if not self._resumed():
                self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (ValueError, TypeError)):
            self._abandon()  # a repeated run would fail again
        self._close()

    def path(self, name: str) -> Path:
        """Where a file is written before it is complete."""
        return self.work / name

    def remaining(self, shards: Sequence[Shard]) -> list[Shard]:
        """The shards that are not finished: not in the journal, or not in their place."""
        return [shard for shard in shards if not self._has(shard)]

    def finish(self, name: str, record: Record, in_place: bool = True) -> None:
        """Moves a complete file to its place (`in_place`), and records it in the journal."""
        if in_place:
            self.place(name, name)
        self._write({_FINISHED: name} | record)
        self.finished[name] = record

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
        """Removes the journal: the folder is complete."""
        if not self.completed:
            self._write({_FINISHED: None})
        for entry in self.work.iterdir():
            if entry.name != _JOURNAL:
                entry.unlink()
        (self.work / _JOURNAL).unlink()
        self.work.rmdir()
        self.settle()

    def _has(self, shard: Shard) -> bool:
        if shard.name not in self.finished:
            return False
        if shard.target is None:
            return True
        file = self.out / shard.name
        return file.is_file() and file.stat().st_size == shard.target_layout.file_size

    def _resumed(self) -> bool:
        """Whether the journal is that of this task; then `finished` holds its records."""
        text = (self.work / _JOURNAL).read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a killed process may have left half a line
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError:  # the system crashed before it was on the disk
            return False
        if not lines:
            return False
        head = self._head | {"boot": lines[0].get("boot")}
        if lines[0] != head and lines[1:] and not self._overwrite:
            raise FileExistsError(
                f"{self.out} has an unfinished run that differs in {self._difference(lines[0])}: "
                "repeat it as it was, or give --overwrite to start over"
            )
        if lines[0] != self._head:
            return False
        os.ftruncate(self._journal, len(whole))
        for line in lines[1:]:
            name = line.pop(_FINISHED)
            if name is None:
                self.completed = True
            else:
                self.finished[name] = line
        return True

    def _start(self) -> None:
        os.ftruncate(self._journal, 0)
        for entry in self.work.iterdir():
            if entry.name != _JOURNAL:
                entry.unlink()
        if self._overwrite:
            self._remove_outputs()
        self._write(self._head)

    def _write(self, line: Mapping[str, Any]) -> None:
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        while content:  # a nearly full disk accepts only a part
            content = content[os.write(self._journal, content) :]

    def _remove_outputs(self) -> None:
        """Removes a model or an adapter, beginning with the files that make the folder one."""
        for name in _COMPLETING:
            (self.out / name).unlink(missing_ok=True)
        for file in self.out.glob("*.safetensors"):
            file.unlink()

    def _difference(self, other: Mapping[str, Any]) -> str:
        task, inputs = other.get("task", {}), other.get("inputs", {})
        for name in {**self._head["task"], **task}:
            if task.get(name) != (now := self._head["task"].get(name)):
                return f"{name} ({task.get(name)}, now {now})"
        changed = [
            name
            for name in {**self._head["inputs"], **inputs}
            if inputs.get(name) != self._head["inputs"].get(name)
        ]
        return f"its input: {', '.join(changed[:3])} changed since"

    def _abandon(self) -> None:
        """Removes everything that was written."""
        for name in self.finished:
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.work)
        with suppress(OSError):  # not empty
            self.out.rmdir()

    def _close(self) -> None:
        if self._journal != _CLOSED:
            os.close(self._journal)
            self._journal = _CLOSED


def _boot() -> str | None:
    """Identifies the current boot of the system, on Linux; else None."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else None
