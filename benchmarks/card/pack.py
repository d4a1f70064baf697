"""The output of a call, in five files that are each replaced in one step.

report.txt   the table
run.json     the same for programs
failed.txt   the ids of the failed tests, which `make gpu-again` takes as TESTS
logs.tar.gz  the output of every part
results.tar  the benchmarks' files; extract it in the root of the repository
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

EVERY = 5.0  # seconds
LONGEST = 2**20  # bytes; the middle of a longer log is omitted


class Pack:
    """Packs the logs in `work` and the new files in `results` into `out`."""

    def __init__(self, out: Path, work: Path, results: Path) -> None:
        self.out, self.work, self.results = out, work, results
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob(".packing-*"):
            left.unlink()
        self._before = {path: stamp(path) for path in results.rglob("*") if path.is_file()}
        self._next = time.monotonic()

    def refresh(
        self, outcomes: Sequence, failing: Callable[[], list[str]], *, at_once: bool = False
    ) -> None:
        """Pack if the last time was `EVERY` seconds ago, or `at_once`."""
        if at_once or time.monotonic() >= self._next:
            try:
                self.write(None, outcomes, failing())
            except OSError as error:  # for instance a full disk; the parts continue
                print(f"not packed: {error}", flush=True)
            self._next = time.monotonic() + EVERY

    def write(self, text: str | None, outcomes: Sequence, failing: Sequence[str]) -> None:
        """Write all files; `text` is the final table, or None before the end."""
        rows = [asdict(outcome) for outcome in outcomes]
        if text is None:
            text = "not finished\n" + "".join(f"{o.part}: {o.result}; {o.said}\n" for o in outcomes)
        known = read_facts(self.work)
        self._put("report.txt", f"{text}\n".encode())
        self._put("run.json", json.dumps({"facts": known, "parts": rows}, indent=1).encode())
        self._put("failed.txt", "".join(f"{test}\n" for test in failing).encode())
        logs = {path.name: clipped(path) for path in sorted(self.work.glob("*.log"))}
        self._put("logs.tar.gz", gzip.compress(tar(logs), compresslevel=1, mtime=0))
        self._put("results.tar", tar(self._new_results()))

    def _new_results(self) -> dict[str, bytes]:
        return {
            f"benchmarks/results/{path.relative_to(self.results)}": path.read_bytes()
            for path in sorted(self.results.rglob("*"))
            if path.is_file() and stamp(path) != self._before.get(path)
        }

    def _put(self, name: str, content: bytes) -> None:
        """Replace a file in one step; a reader finds the old content or the new."""
        path, beside = self.out / name, self.out / f".packing-{name}"
        if path.is_file() and path.read_bytes() == content:
            return
        beside.write_bytes(content)
        beside.replace(path)


def read_facts(work: Path) -> dict:
    """The facts that `benchmarks.card.facts` wrote; empty if it has not finished."""
    try:
        return json.loads((work / "facts.json").read_text())
    except (OSError, ValueError):
        return {}


def stamp(path: Path) -> tuple[int, int, int]:
    """A value that changes when a file is written again."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def clipped(path: Path) -> bytes:
    """A log; of a long one, its beginning and its end."""
    content = path.read_bytes()
    if len(content) <= LONGEST:
        return content
    return content[: LONGEST // 4] + b"\n[...]\n" + content[-3 * LONGEST // 4 :]


def tar(files: dict[str, bytes]) -> bytes:
    """A tar archive of files in memory, without times, so that equal files give equal archives."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
