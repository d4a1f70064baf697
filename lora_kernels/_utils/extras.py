"""Optional dependencies (extras), imported only where they are needed."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class MissingExtraError(ImportError):
    """A package of an extra is not installed."""


def needed(module: str, purpose: str, extra: str) -> ModuleType:
    """Imports a module, or raises a `MissingExtraError` that says what to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"{purpose} needs the package {package}: pip install 'lora-kernels[{extra}]'"
        ) from None
