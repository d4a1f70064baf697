"""Runs a function in several processes that are the ranks of one gloo group.

The processes are forked from the test's process, which has imported torch and transformers already.
A case takes a second; with new interpreters it takes ten.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

needs_ranks = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


class RankFailed(NamedTuple):
    """What a rank raised."""

    type: str
    text: str
    traceback: str


def on_ranks(
    world: int, work: Callable[[int], Any], seconds: float = 60, *, check: bool = True
) -> list[Any]:
    """[work(rank) for each rank], where each call runs in a process of its own, with
    `torch.distributed` initialized. What `work` returns must be pickled by torch.save.

    With `check`, raises AssertionError with the traceback of the first rank that failed; without,
    the results of such ranks are `RankFailed`. A rank that takes longer than `seconds` is killed,
    and the call fails: nothing may hang.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_run, args=(rank, world, work, Path(folder), seconds))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(seconds)
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        results = [_result(Path(folder) / str(rank)) for rank in range(world)]
        errors = "".join(f"\n{r.traceback}" for r in results if isinstance(r, RankFailed))
        assert not late, f"ranks {late} of {world} took longer than {seconds} s: they hang{errors}"
    failed = [result for result in results if isinstance(result, RankFailed)]
    assert not (check and failed), failed[0].traceback
    return results


def _run(rank: int, world: int, work: Callable[[int], Any], folder: Path, seconds: float) -> None:
    torch.set_num_threads(1)  # the parent's OpenMP threads do not exist here
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    try:
        result = work(rank)
    except BaseException as error:
        text = traceback.format_exc()
        result = RankFailed(type(error).__name__, str(error), f"rank {rank}:\n{text}")
    torch.save(result, folder / str(rank))
    with suppress(RuntimeError):  # another rank has ended already
        dist.barrier()
        dist.destroy_process_group()


def _result(file: Path) -> Any:
    if not file.exists():
        return RankFailed("", "", f"rank {file.name} ended without a result")
    return torch.load(file, weights_only=False)
