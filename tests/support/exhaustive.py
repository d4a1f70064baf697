"""Whether all combinations are tested: LORA_KERNELS_TEST_ALL=1, set by continuous integration.

Without it, `make test` runs the large sweeps in full only for the best instruction set and mostly
skips them for the others, and compiles the Triton kernels ahead of time for one architecture only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import torch

T = TypeVar("T")
EXHAUSTIVE = os.environ.get("LORA_KERNELS_TEST_ALL") == "1"
# Whether the sweeps of Triton kernels are complete: on a GPU they are quick.
ALL_KERNELS = EXHAUSTIVE or torch.cuda.is_available()


def sampled(combinations: Iterable[T]) -> list[T]:
    """All combinations of a sweep of kernels; or every third, if they run in Triton's interpreter,
    which takes seconds for many of them.
    """
    found = list(combinations)
    return found if ALL_KERNELS else found[::3]
