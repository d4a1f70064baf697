"""Whether all combinations are tested: LORA_KERNELS_TEST_ALL=1, set by continuous integration.

Without it, `make test` runs the large sweeps in full only for the best instruction set, mostly
skips them for the others, and compiles only a third of the launches of Triton kernels ahead of
time, and for only one architecture.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch

T, U = TypeVar("T"), TypeVar("U")
EXHAUSTIVE = os.environ.get("LORA_KERNELS_TEST_ALL") == "1"
# Whether the sweeps of Triton kernels are complete: they are quick on a GPU.
ALL_KERNELS = EXHAUSTIVE or torch.cuda.is_available()


def sampled(combinations: Iterable[T]) -> list[T]:
    """All combinations of a sweep of kernels; only every eleventh if they run in Triton's
    interpreter, which takes seconds for many of them.
    """
    found = list(combinations)
    return found if ALL_KERNELS else found[::11]


def paired(values: Iterable[T], others: Sequence[U]) -> list[tuple[T, U]]:
    """All pairs if EXHAUSTIVE; else every value with one of the others, in turn."""
    if EXHAUSTIVE:
        return [(value, other) for value in values for other in others]
    return [(value, others[k % len(others)]) for k, value in enumerate(values)]


def thinned(combinations: Iterable[T], step: int = 3) -> list[T]:
    """All combinations of a sweep if EXHAUSTIVE; else one of every `step`. `step` must have no
    factor in common with the numbers of values, so that every value occurs.
    """
    found = list(combinations)
    return found if EXHAUSTIVE else found[::step]
