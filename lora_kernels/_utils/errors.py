"""Error texts that several modules share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def unknown_name(option: str, value: object, allowed: Sequence[str]) -> ValueError:
    """An error that lists the allowed names and suggests the nearest one."""
    hint = did_you_mean(str(value).lower(), allowed)
    return ValueError(f"unknown {option} {value!r}: expected one of {', '.join(allowed)}{hint}")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error: the most similar of `names`, or "" if none is similar."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
