"""The lines of a journal: the task, and a record for each complete shard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def identity(file: Path) -> str:
    """Identifies the version of a file by its size and its time of modification."""
    status = file.stat()
    return f"{status.st_size} bytes of {status.st_mtime_ns}"


def boot() -> str | None:
    """Identifies the current boot of the system on Linux; None elsewhere."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else None


def read_lines(journal: Path) -> tuple[list[Record], int]:
    """The complete lines of a journal, and their size in bytes: a killed process may have left half
    a line. The list is empty if the file is damaged, because the system crashed before it was on
    disk.
    """
    text = journal.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole)
    except ValueError:
        return [], 0


def write_line(descriptor: int, line: Mapping[str, Any]) -> None:
    """Appends a line to an open journal."""
    content = (json.dumps(line, allow_nan=False) + "\n").encode()
    while content:  # a nearly full disk may accept only a part
        content = content[os.write(descriptor, content) :]


def difference(task: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The first argument, or the inputs, in which a journal's first line `other` differs."""
    tasks = task["task"], other.get("task", {})
    for name in {**tasks[0], **tasks[1]}:
        if tasks[1].get(name) != (now := tasks[0].get(name)):
            return f"{name} ({tasks[1].get(name)}, now {now})"
    inputs = task["inputs"], other.get("inputs", {})
    names = [n for n in {**inputs[0], **inputs[1]} if inputs[1].get(n) != inputs[0].get(n)]
    return f"its input: {', '.join(names[:3])} changed since"
