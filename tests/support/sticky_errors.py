"""Errors that a CUDA context never recovers from: the process that has one must end.

After an illegal address every later call of that process fails, whatever test makes it.
pytest-xdist names the test in which a worker ends, and starts another; alone, the run stops there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest


def end_if_broken(config: pytest.Config, test: str, synchronize: Callable[[], object]) -> None:
    """Fails the test if the device reports an error, and ends the process if it does so again."""
    try:
        synchronize()
        return
    except RuntimeError as error:
        first = str(error)
    try:
        synchronize()
    except RuntimeError as error:
        message = f"{test} left the device unusable: {error}"
        if not hasattr(config, "workerinput"):
            pytest.exit(message, returncode=1)
        print(message, file=sys.__stderr__, flush=True)
        os._exit(1)  # an ordinary exit would wait for the device
    pytest.fail(f"{test} left an error on the device: {first}")
