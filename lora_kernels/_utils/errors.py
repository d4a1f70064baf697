"""Error texts that several modules share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def unknown_name(option: str, value: object, allowed: Sequence[str]) -> ValueError:
    """A ValueError that lists the allowed names and suggests the nearest."""
    hint = nearest_name(value, allowed)
    return ValueError(f"unknown {option} {value!r}: expected one of {', '.join(allowed)}{hint}")


def nearest_name(value: object, allowed: Sequence[str]) -> str:
    """The end of an error: the allowed name that was meant, if one is near."""
    near = difflib.get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
