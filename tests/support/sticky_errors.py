"""Errors from which a CUDA context never recovers: the process has to end.

After an illegal address every later call of the process fails, whichever test makes it.
pytest-xdist reports the test in which a worker ended, and starts another worker; without it, the
run stops.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest


def end_if_broken(config: pytest.Config, test: str, synchronize: Callable[[], object]) -> None:
    """Fails the test if the device reports an error; ends the process if it reports another."""
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
        os._exit(1)  # a regular exit would wait for the device
    pytest.fail(f"{test} left an error on the device: {first}")
