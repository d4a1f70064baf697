"""Runs `initialize` and kills it again and again:
`python -m tests.files.checkpoint.killed FOLDER KILLS`.

In a process of its own with OMP_NUM_THREADS=1: its children are forks of it, so that a run starts
in a millisecond, and no thread of torch is there when it forks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from lora_kernels._utils.model_files import JOURNAL_FOLDER, is_unfinished
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.model.config import LoRAConfig

from .folders import fingerprint


def start(model: Path, out: Path, residual: str) -> int:
    """Forks a process that runs `initialize`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            config = LoRAConfig(r=4, init_lora_weights="loram", residual=residual)
            initialize(model, out, config)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def in_place(out: Path) -> dict[str, int]:
    """The inode numbers of the shards that are in the journal and in place."""
    journal = out / JOURNAL_FOLDER / "journal.jsonl"
    text = journal.read_text() if journal.is_file() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    names = [line["finished"] for line in lines[1:] if line["finished"]]
    return {n: (out / n).stat().st_ino for n in names if (out / n).is_file()}


def check(out: Path, expected: dict[str, str], complete: bool) -> None:
    """Files in place are complete, and the folder looks like a model only when it is one."""
    found = {k: v for k, v in fingerprint(out).items() if not k.startswith(JOURNAL_FOLDER)}
    for name, content in found.items():
        assert expected[name] == content, f"{name} is not whole"
    entry = "adapter_config.json" if "adapter_config.json" in expected else "config.json"
    if entry in found or complete:
        assert found == expected, "it looks complete, and is not"
    if complete:
        assert not is_unfinished(out), "something is left over"


def main(folder: Path, kills: int) -> None:
    """Prints how many kills hit each state."""
    rng = random.Random(0)
    counts = {"before": 0, "between": 0, "after": 0, "completed": 0, "kept": 0}
    for residual in ("absorb", "implicit"):
        model, out = folder / "model", folder / residual
        initialize(model, folder / f"warm-{residual}", LoRAConfig(r=4, residual=residual))
        began = time.perf_counter()
        os.waitpid(start(model, out, residual), 0)
        length = time.perf_counter() - began
        expected = fingerprint(out)
        check(out, expected, complete=True)
        left = kills // 2
        while left:
            out.rename(folder / f"{residual}-{left}")  # the recipe has its name: the same again
            done: dict[str, int] = {}
            while True:
                child = start(model, out, residual)
                if left:
                    time.sleep(rng.uniform(0, 1.1 * length))
                    os.kill(child, signal.SIGKILL)
                    left -= 1
                _, status = os.waitpid(child, 0)
                kept = sum((out / n).stat().st_ino == inode for n, inode in done.items())
                assert kept == len(done), "a finished shard was written again"
                counts["kept"] += kept
                if os.WIFEXITED(status):
                    assert os.WEXITSTATUS(status) == 0, "a repeated run failed"
                    check(out, expected, complete=True)
                    counts["completed"] += 1
                    break
                if out.exists() and not is_unfinished(out) and any(out.iterdir()):
                    check(out, expected, complete=True)
                    counts["after"] += 1  # nothing was left to do
                    break
                done = in_place(out) if out.exists() else {}
                if out.exists():
                    check(out, expected, complete=False)
                counts["between" if done else "before"] += 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
