"""Runs `initialize` on several ranks, kills all of them or one, and repeats it with another number:
`python -m tests.files.checkpoint.killed_ranks FOLDER KILLS`.

In a process of its own with OMP_NUM_THREADS=1, as `killed`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from lora_kernels._utils.model_files import is_unfinished
from lora_kernels.files.checkpoint.initialize import initialize
from lora_kernels.files.io.journal import Ranks
from lora_kernels.model.config import LoRAConfig

from .folders import fingerprint
from .killed import check
from .processes import Launched


def main(folder: Path, kills: int) -> None:
    """Prints how many runs were killed whole or lost one rank, and how many completed after it."""
    rng = random.Random(0)
    counts = {"all": 0, "one": 0, "completed": 0, "resumed": 0}
    model = folder / "model"
    for residual in ("absorb", "implicit"):
        out = folder / residual
        config = LoRAConfig(r=4, init_lora_weights="pissa", residual=residual)
        initialize(model, out, config)
        expected = fingerprint(out)

        def work(ranks: Ranks) -> None:
            done = initialize(model, out, config, ranks=ranks)  # noqa: B023
            if ranks.is_main and done.resumed:
                (folder / "resumed").touch()

        left = kills // 2
        while left or out.exists():
            if not is_unfinished(out):
                out.rename(folder / f"{residual}-{left}-{rng.random()}")
            world = rng.choice((1, 2, 3))
            run = Launched(world, work, folder / "ends")
            hit: tuple[int, ...] = ()
            if left:
                time.sleep(rng.uniform(0, 0.4))
                hit = () if rng.random() < 0.5 else (rng.randrange(world),)
                run.kill(*hit)
                left -= 1
                counts["one" if hit and world > 1 else "all"] += 1
            ends = run.wait()
            errors = [end.text for end in ends if end.text]
            assert all("ended before its part was done" in text for text in errors), errors
            if out.exists() and not is_unfinished(out) and any(out.iterdir()):
                check(out, expected, complete=True)
                counts["completed"] += 1
                if not left:
                    break
            elif out.exists():
                check(out, expected, complete=False)
        counts["resumed"] += (folder / "resumed").exists()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
