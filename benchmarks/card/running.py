"""Run the parts of a stage at the same time, each in its own process group with a time limit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.card.pack import Pack
from benchmarks.card.parts import Call, Part

POLL = 0.1
GRACE = 4.0  # seconds from SIGINT to SIGKILL, in which pytest prints its summary
ENDING = 12.0  # seconds reserved for the last packing and the table
LEAST = 8.0  # seconds; a part that would have less is not started
HEARTBEAT = 20.0


@dataclass
class Outcome:
    """The row of a part in the table."""

    part: str
    result: str
    seconds: float | None = None
    said: str = ""
    good: bool = True


@dataclass
class Running:
    """The process of a part; `begin`, `limit` and `stopping` are times of the monotonic clock."""

    part: Part
    process: subprocess.Popen
    begin: float
    limit: float
    log: Path
    ids: Path
    stopping: float | None = field(default=None)


class Runner:
    """Runs parts; `outcomes` has a row for every part that has ended."""

    def __init__(self, call: Call, pack: Pack, root: Path, minutes: float, meant: float) -> None:
        self.call, self.pack, self.root = call, pack, root
        self.scale = minutes / meant
        self.outcomes: list[Outcome] = []
        self.started = datetime.now(timezone.utc)
        self._running: list[Running] = []
        self._deadline = time.monotonic() + 60 * minutes - ENDING * min(self.scale, 1.0)
        self._heartbeat = time.monotonic()

    @property
    def failed(self) -> bool:
        """Whether any part failed."""
        return not all(outcome.good for outcome in self.outcomes)

    def run_stage(self, parts: list[Part]) -> None:
        """Run parts at the same time, until all have ended."""
        for part in parts:
            self._start(part)
        while self._running:
            for running in self._running.copy():
                self._watch(running)
            self._beat()
            self.pack.refresh(self.outcomes, self.failing_tests)
            time.sleep(POLL)
        self.pack.refresh(self.outcomes, self.failing_tests, at_once=True)

    def stop(self) -> None:
        """Kill all running parts."""
        for running in self._running:
            self._signal(running, signal.SIGKILL)
            running.process.wait()
            self._end(running, "stopped: the call was ended", good=False)
        self._running.clear()

    def failing_tests(self) -> list[str]:
        """The tests that failed or were running when their part was stopped, without duplicates."""
        found: dict[str, None] = {}
        for path in sorted(self.call.work.glob("*.ids"), key=lambda p: p.stat().st_mtime):
            running: dict[str, None] = {}
            for line in path.read_text(errors="replace").splitlines():
                event, _, test = line.partition("\t")
                if event == "failed":
                    found[test] = None
                elif event == "begin":
                    running[test] = None
                elif event == "end":
                    running.pop(test, None)
            if not any(running_.ids == path for running_ in self._running):
                found |= running
        return list(found)

    def _start(self, part: Part) -> None:
        now = time.monotonic()
        seconds = min(part.limit * self.scale, self._deadline - now)
        command = self._command(part, seconds)
        if isinstance(command, Outcome):
            self._note(command)
            return
        stem = part.name.replace(", ", "-").replace(" ", "-")
        log, ids = (self.call.work / f"{stem}.{end}" for end in ("log", "ids"))
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **part.environment}
        environment |= {"CARD_IDS": str(ids), "PYTHONPATH": self._python_path()}
        print(f"[{self._clock()}] {part.name}: begins, {seconds:.0f} s at most", flush=True)
        with log.open("w") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            try:
                # A process group, not a session, so that the caller can still find all processes.
                process = subprocess.Popen(
                    command, cwd=self.root, env=environment, stdin=subprocess.DEVNULL,
                    stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp,
                )  # fmt: skip
            except OSError as error:
                self._note(Outcome(part.name, f"FAILED: {error}", good=False))
                return
        self._running.append(Running(part, process, now, now + seconds, log, ids))

    def _command(self, part: Part, seconds: float) -> list[str] | Outcome:
        """The command of a part, or the reason why it does not run."""
        if part.needs and shutil.which(part.needs) is None:
            return Outcome(part.name, f"not run: no {part.needs} here")
        if seconds < LEAST * min(self.scale, 1.0):
            return Outcome(part.name, "NOT RUN: no time left", good=False)
        try:
            command = part.command(self.call, seconds)
        except OSError as error:
            return Outcome(part.name, f"FAILED: {error}", good=False)
        return command or Outcome(part.name, "not run: nothing to do")

    def _watch(self, running: Running) -> None:
        now, code = time.monotonic(), running.process.poll()
        if code is not None:
            # Workers that outlive their parent would slow down the next parts.
            self._signal(running, signal.SIGKILL)
            self._running.remove(running)
            if running.stopping is not None:
                self._end(running, self._limit_text(running), good=False)
            elif code:
                self._end(running, f"FAILED ({code})", good=False)
            else:
                self._end(running, "passed", good=True)
        elif running.stopping is not None:
            if now > running.stopping:
                self._signal(running, signal.SIGKILL)
        elif now > running.limit:
            running.stopping = now + GRACE * min(self.scale, 1.0)
            self._signal(running, signal.SIGINT)

    def _limit_text(self, running: Running) -> str:
        return f"STOPPED at {running.limit - running.begin:.0f} s"

    def _end(self, running: Running, result: str, good: bool) -> None:
        seconds = time.monotonic() - running.begin
        said = last_line(running.log)
        self._note(Outcome(running.part.name, result, seconds, said, good))

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        took = "" if outcome.seconds is None else f" in {outcome.seconds:.0f} s"
        said = f"; {outcome.said}" if outcome.said else ""
        print(f"[{self._clock()}] {outcome.part}: {outcome.result}{took}{said}", flush=True)

    def _beat(self) -> None:
        now = time.monotonic()
        if now - self._heartbeat > HEARTBEAT:
            self._heartbeat = now
            names = ", ".join(running.part.name for running in self._running)
            print(f"[{self._clock()}] running: {names}", flush=True)

    def _clock(self) -> str:
        seconds = (datetime.now(timezone.utc) - self.started).total_seconds()
        return f"{int(seconds // 60)}:{int(seconds % 60):02d}"

    def _python_path(self) -> str:
        return os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")]))

    def _signal(self, running: Running, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(running.process.pid, number)


def last_line(log: Path) -> str:
    """The last line that a part printed, usually its result."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").splitlines()
    words = (line.strip().strip("=").strip() for line in reversed(lines))
    return next((line for line in words if line and not line.startswith("$ ")), "")[:100]
