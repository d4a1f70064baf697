"""Names of modules: PEFT's rules for `target_modules` and for patterns; suggestions for errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .errors import did_you_mean

ALL_LINEAR = "all-linear"
# Modules that torch.compile, activation checkpointing and FSDP insert above a block.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def match_names(
    names: Iterable[str],
    targets: str | Sequence[str],
    candidates: Iterable[str] | None = None,
    option: str = "targets",
) -> list[str]:
    """The `names` that match a regular expression, or an entry of a list of names and endings.

    Every entry of a list has to match something. Errors suggest one of `candidates` (default:
    `names`) and refer to the targets as `option`.
    """
    names = list(names)
    candidates = names if candidates is None else list(candidates)
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(
                f"{option} {targets!r} is not a regular expression: {error}; for a plain name give "
                "a list"
            ) from None
        found = [name for name in names if pattern.fullmatch(name)]
        if not found:
            raise ValueError(
                f"no module's whole name matches the regular expression {targets!r}"
                f"{nearest(targets, candidates)}"
            )
        return found
    if not targets:
        raise ValueError("targets is empty: give names, or 'all-linear'")
    for target in targets:
        if not isinstance(target, str):
            raise TypeError(
                f"{option} must be names or linear layers, got {type(target).__name__} in the list"
            )
        if not any(_ends_with(name, target) for name in names):
            given = "" if option == "targets" else f", which {option} names"
            raise ValueError(f"no module is called {target!r}{given}{nearest(target, candidates)}")
    return [name for name in names if any(_ends_with(name, target) for target in targets)]


def without_wrappers(name: str) -> str:
    """The name that a module or tensor has in the same model without compiled or wrapped blocks."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def nearest(target: str, names: Iterable[str]) -> str:
    """The end of an error about a module: suggests a similar name, or the last part of one."""
    names = list(names)
    endings = dict.fromkeys(name.rpartition(".")[2] for name in names)
    shown = ", ".join(list(endings)[:8])
    listed = f"; the linear layers here end in {shown}" if shown else ""
    return did_you_mean(target, [*endings, *names]) or listed


def pattern_matches(pattern: str, name: str) -> bool:
    """PEFT's rule for keys of `rank_pattern` and `alpha_pattern`: they match the end of a name."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
