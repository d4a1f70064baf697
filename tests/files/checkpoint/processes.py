"""Runs work in several processes that are the ranks of one run, forked from the test's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels.files.io.journal import Ranks

SECONDS = 60.0  # no rank takes longer


class Ended(NamedTuple):
    """How a rank has ended: by a signal, with the type and text of an error, or with ""."""

    killed: bool
    type: str
    text: str


class Launched:
    """`world` processes, of which each calls `work(ranks)`."""

    def __init__(self, world: int, work: Callable[[Ranks], Any], folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(target=self._run, args=(Ranks(rank, world, rank, world), work))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def _run(self, ranks: Ranks, work: Callable[[Ranks], Any]) -> None:
        torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here
        text = ""
        try:
            work(ranks)
        except BaseException as error:
            text = f"{type(error).__name__}\n{error}\n"
            (self._folder / f"{ranks.rank}.traceback").write_text(traceback.format_exc())
        (self._folder / str(ranks.rank)).write_text(text)

    def kill(self, *ranks: int) -> None:
        """Kills these ranks, or all."""
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, signal.SIGKILL)

    def wait(self) -> list[Ended]:
        """Waits until all have ended; fails if one hangs."""
        deadline = time.monotonic() + SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        if late:
            self.kill(*late)
        assert not late, f"ranks {late} of {len(self.processes)} hang"
        return [self._ended(rank) for rank in range(len(self.processes))]

    def _ended(self, rank: int) -> Ended:
        code = self.processes[rank].exitcode
        if code == -signal.SIGKILL:
            return Ended(True, "", "")
        assert code == 0, f"rank {rank} ended with {code}"
        kind, _, text = (self._folder / str(rank)).read_text().partition("\n")
        return Ended(False, kind, text.rstrip("\n"))


def on_ranks(world: int, work: Callable[[Ranks], Any], folder: Path) -> list[Ended]:
    """Runs `work` on `world` ranks and waits for them."""
    return Launched(world, work, folder).wait()
