"""Error texts that several modules share, and the error for an optional package (an extra)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from importlib import import_module
from types import ModuleType


def unknown_name(option: str, value: object, allowed: Sequence[str]) -> ValueError:
    """An error that lists the allowed names and suggests the nearest one."""
    hint = did_you_mean(str(value).lower(), allowed)
    return ValueError(f"unknown {option} {value!r}: expected one of {', '.join(allowed)}{hint}")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error: the most similar of `names`, or "" if none is similar."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


class MissingExtraError(ImportError):
    """An optional package, which an extra installs, is missing."""


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
