"""Names of modules: PEFT's rules for `target_modules` and for patterns, and the nearest name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

ALL_LINEAR = "all-linear"
# What torch.compile, activation checkpointing and FSDP put between a block and its layers.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def match_names(
    names: Iterable[str],
    targets: str | Sequence[str],
    candidates: Iterable[str] | None = None,
    option: str = "targets",
) -> list[str]:
    """Those of `names` that a regular expression or a list of names and endings matches.

    Every entry of a list has to match. `candidates` (default: `names`) are what the error suggests,
    `option` what it calls `targets`.
    """
    names = list(names)
    candidates = names if candidates is None else list(candidates)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"{option} {targets!r} is no regular expression: {error}; for a plain name give "
                "a list"
            ) from None
        found = [name for name in names if pattern.fullmatch(name)]
        if not found:
            raise ValueError(
                f"no module's whole name matches the regular expression {targets!r}"
                f"{nearest(targets, candidates)}"
            )
        return found
    for target in _filled(targets):
        if not isinstance(target, str):
            raise TypeError(
                f"{option} must be names or linear layers, got {type(target).__name__} in the list"
            )
        if not any(_ends_with(name, target) for name in names):
            given = "" if option == "targets" else f", which {option} names"
            raise ValueError(f"no module is called {target!r}{given}{nearest(target, candidates)}")
    return [name for name in names if any(_ends_with(name, target) for target in targets)]


def without_wrappers(name: str) -> str:
    """What a module or a tensor is called where none of its blocks is compiled or wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _filled(targets):
    if not targets:
        raise ValueError("targets is empty: give names, or 'all-linear'")
    return targets


def nearest(target: str, names: Iterable[str]) -> str:
    """A suggestion, the last parts of the names first."""
    names = list(names)
    endings = dict.fromkeys(name.rpartition(".")[2] for name in names)
    near = difflib.get_close_matches(target, [*endings, *names], n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = ", ".join(list(endings)[:8])
    return f"; the linear layers here end in {shown}" if shown else ""


def pattern_matches(pattern: str, name: str) -> bool:
    """PEFT's rule for the keys of `rank_pattern` and `alpha_pattern`: the end of a name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
