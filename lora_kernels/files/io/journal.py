"""A folder while it is being written, and what of it is finished, so that a killed run goes on.

What is unfinished lies in a hidden folder inside: files under their names until they are whole, and
a journal. Its first line says what is being made, from which inputs; every further one that a
shard is finished and has its place.

Nothing waits for the disk meanwhile, as `cp` does not: what a killed process has written, the
system still writes. If the system itself went down, which the journal sees, a run starts again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._utils.safetensors import WORK, is_unfinished

if TYPE_CHECKING:
    from .pipeline import Shard

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_JOURNAL = "journal.jsonl"
_FINISHED = "finished"  # a shard, or None for all there is to do
# Without which a folder is no model, or no adapter.
_COMPLETING = ("config.json", "model.safetensors.index.json", "adapter_config.json",
               "adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # fmt: skip

Record = dict[str, Any]


def identity(file: Path) -> str:
    """What a file is recognised by: its size, and when it was last written."""
    status = file.stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


class UnfinishedFolder:
    """The folder `out`, locked against others for as long as this is used as a context manager.

    `task` are the arguments and `inputs` the files, name by `identity`. `finished` has the records
    of an earlier run of the same task. `sync`: before the last file is written, without which the
    folder is no model or adapter, all others have reached the disk.

    Raises:
        FileExistsError: the folder has other contents, or what another task has finished.
        BlockingIOError: another process is at work in it.

    """

    def __init__(
        self,
        out: Path,
        task: Mapping[str, Any],
        inputs: Mapping[str, str],
        overwrite: bool = False,
        sync: bool = False,
    ) -> None:
        self.out, self.work = out, out / WORK
        self.finished: dict[str, Record] = {}
        self.completed = False  # but for what is hidden
        head = {"task": dict(task), "inputs": dict(inputs), "boot": _boot()}
        self._head = json.loads(json.dumps(head))  # as it comes out of the journal
        self._overwrite, self._sync = overwrite, sync
        self._journal: int | None = None

    def __enter__(self) -> UnfinishedFolder:
        if self.out.exists() and not self.out.is_dir():
            raise FileExistsError(f"{self.out} is a file: give a folder to write into")
        new = not is_unfinished(self.out)
        if new and not self._overwrite and self.out.exists() and any(self.out.iterdir()):
            raise FileExistsError(f"{self.out} is not empty: give another folder, or --overwrite")
        self.work.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._journal = os.open(self.work / _JOURNAL, flags, 0o666)
        try:
            self._lock()
            if not self._resumed():
                self._start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def path(self, name: str) -> Path:
        """Where a file is written before it is whole."""
        return self.work / name

    def left(self, shards: Sequence[Shard]) -> list[Shard]:
        """Those that are not finished: journalled, and there if they have a place."""
        return [shard for shard in shards if not self._has(shard)]

    def finish(self, name: str, record: Record, in_place: bool = True) -> None:
        """Gives a file that is whole its place (`in_place`), and journals it."""
        if in_place:
            self.place(name, name)
        self._write({_FINISHED: name} | record)
        self.finished[name] = record

    def put(self, name: str | Path, content: bytes) -> None:
        """Writes a small file, and puts it in its place."""
        self.path("content").write_bytes(content)
        self.place("content", name)

    def place(self, staged: str, name: str | Path) -> None:
        """Puts a file that is whole in its place."""
        target = self.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path(staged).replace(target)

    def settle(self) -> None:
        """Waits for the disk, if that is asked for."""
        if self._sync:
            for folder, _, names in os.walk(self.out):
                for name in (*names, "."):
                    _fsync(Path(folder) / name)

    def complete(self) -> None:
        """Removes what is hidden: the folder is what it was to be."""
        if not self.completed:
            self._write({_FINISHED: None})
        for entry in self.work.iterdir():
            if entry.name != _JOURNAL:
                entry.unlink()
        (self.work / _JOURNAL).unlink()
        self.work.rmdir()
        self.settle()

    def abandon(self) -> None:
        """Removes all that was written, where going on could not help."""
        for name in self.finished:
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.work)
        with suppress(OSError):  # not empty
            self.out.rmdir()

    def _has(self, shard: Shard) -> bool:
        if shard.name not in self.finished:
            return False
        if shard.target is None:
            return True
        file = self.out / shard.name
        return file.is_file() and file.stat().st_size == shard.target_layout.file_size

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BlockingIOError(f"another process is writing {self.out}") from None

    def _resumed(self) -> bool:
        """Whether the journal is one of this task; `finished` is what it says."""
        text = (self.work / _JOURNAL).read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a killed process may have left half a line
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError:  # the system went down before the disk had it
            return False
        if not lines:
            return False
        head = self._head | {"boot": lines[0].get("boot")}
        if lines[0] != head and lines[1:] and not self._overwrite:
            raise FileExistsError(
                f"{self.out} has an unfinished run that differs in {self._difference(lines[0])}: "
                "repeat it as it was, or give --overwrite to start again"
            )
        if lines[0] != self._head:
            return False
        os.ftruncate(self._journal, len(whole))
        self.finished = {line.pop(_FINISHED): line for line in lines[1:]}
        self.completed = self.finished.pop(None, None) is not None
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
        while content:  # a disk that is nearly full takes a part
            content = content[os.write(self._journal, content) :]

    def _remove_outputs(self) -> None:
        """What made the folder a model or an adapter, the files without which it is none first."""
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

    def _close(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None


def _boot() -> str | None:
    """What tells one run of the system from the next, where it says so."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else None


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
