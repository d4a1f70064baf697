"""What a call brings home: five files, each written beside its place and then put there.

report.txt   the table
run.json     the same for a program
failed.txt   the ids of the tests that failed: TESTS of the next call
logs.tar.gz  what every part printed
results.tar  the benchmarks' files: `tar xf` in the repository puts them where they belong
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
LONGEST = 2**20  # bytes of a log; of a longer one the middle is left out


class Pack:
    """Collects `work`'s logs, and what is new in `results`, in `out`."""

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
        """Packs if it is time to."""
        if at_once or time.monotonic() >= self._next:
            try:
                self.write(None, outcomes, failing())
            except OSError as error:  # a full disk, say: the parts go on
                print(f"not packed: {error}", flush=True)
            self._next = time.monotonic() + EVERY

    def write(self, text: str | None, outcomes: Sequence, failing: Sequence[str]) -> None:
        """All files, as they are known now; `text` is the final table."""
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
        """A reader finds the old file or the new one, never a part of it."""
        path, beside = self.out / name, self.out / f".packing-{name}"
        if path.is_file() and path.read_bytes() == content:
            return
        beside.write_bytes(content)
        beside.replace(path)


def read_facts(work: Path) -> dict:
    """What `benchmarks.card.facts` wrote; nothing if it was stopped before it had."""
    try:
        return json.loads((work / "facts.json").read_text())
    except (OSError, ValueError):
        return {}


def stamp(path: Path) -> tuple[int, int, int]:
    """Another one once a file has been written again."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def clipped(path: Path) -> bytes:
    """A log's beginning and its end."""
    content = path.read_bytes()
    if len(content) <= LONGEST:
        return content
    return content[: LONGEST // 4] + b"\n[...]\n" + content[-3 * LONGEST // 4 :]


def tar(files: dict[str, bytes]) -> bytes:
    """Of files in memory; the time is left out, so that equal files are equal tars."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
