"""Placeholder of the lead until the helper's file lands: same names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def rewrapped(module: nn.Module) -> Iterator[None]:
    yield


def distribute_factors(adapter: nn.Module, mesh: Any, placements: Any) -> None:
    raise NotImplementedError
