"""The aims that are in no CSV file. `svd_speedups.csv`, `host_init.csv` and the targets on a GPU
have a column for their aims.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def where_bold(lines: Iterable[Sequence[str]]) -> str:
    """How many numbers of a table's lines are bold, where bold means that a number misses its
    aim.
    """
    count = sum(cell.startswith("**") for line in lines for cell in line[1:])
    if not count:
        return "No number misses the aim"
    return (
        f"{count} numbers in bold miss the aim" if count > 1 else "The bold number misses the aim"
    )


def init_aim(dtype: str, r: int) -> float:
    """The aim for a LoRAM start, as a multiple of the time to read W once and rewrite W once."""
    return 1.2 if dtype == "fp32" and r <= 128 else 1.5


# `init` may take the time of `cp` divided by this.
OF_CP = 0.7
# With AVX2: the speed of `randomized_svd`, as a multiple of `svd_lowrank`'s at niter 16.
AVX2_SVD = 2.5
# With AVX2: a 16-bit layer's time as a multiple of the same layer's in float32.
AVX2_LINEAR = 1.3
