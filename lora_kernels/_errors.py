"""Error texts that several modules share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def unknown_name(option: str, value: object, allowed: Sequence[str]) -> ValueError:
    """A ValueError that lists the allowed names and suggests the nearest."""
    hint = nearest(str(value).lower(), allowed)
    return ValueError(f"unknown {option} {value!r}: expected one of {', '.join(allowed)}{hint}")


def nearest(name: str, names: Sequence[str]) -> str:
    """The end of an error text that suggests the one that is most alike; "" if none is."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
