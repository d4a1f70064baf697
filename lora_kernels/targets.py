"""Which modules of a model are meant: PEFT's rules for `target_modules`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

ALL_LINEAR = "all-linear"
# What torch.compile, activation checkpointing and FSDP put between a block and its layers.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
Targets = str | Sequence[str] | Mapping[str, nn.Module] | Sequence[nn.Module]


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is [in, out]. Told without transformers."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """An `nn.Linear` (a `LoRALinear` is one too) or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def find_targets(model: nn.Module, targets: Targets = ALL_LINEAR) -> dict[str, nn.Module]:
    """The targeted linear layers by name, in the model's order.

    Args:
        model: what is searched. A module that appears under several names counts under each.
        targets: "all-linear", every linear layer but the output head; another string, a regular
            expression that matches the whole name; a list of names or of their last parts
            ("q_proj", "mlp.up_proj"); a list of the modules themselves, or a dict {name: module}.

    Raises:
        ValueError: nothing matches, or an entry of the list matches nothing (the nearest name is
            given), or a module is not in the model.
        TypeError: a target is no linear layer.

    """
    if isinstance(targets, Mapping):
        return {name: _checked(name, module) for name, module in _filled(targets).items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(targets, str) and any(isinstance(t, nn.Module) for t in targets):
        return _names_of(modules, targets)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        head = output_head(model)
        found = [n for n, m in modules.items() if is_linear(m) and m is not head]
        if not found:
            raise ValueError(f"{type(model).__name__} has no linear layer")
        return {name: modules[name] for name in found}
    linear = [name for name, module in modules.items() if is_linear(module)]
    return {n: _checked(n, modules[n]) for n in match_names(list(modules), targets, linear)}


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


def _checked(name: str, module: nn.Module) -> nn.Module:
    if not is_linear(module):
        raise TypeError(
            f"{name!r} is {type(module).__name__}; a target must be an nn.Linear or a Conv1D"
        )
    return module


def _names_of(
    modules: Mapping[str, nn.Module], targets: Sequence[nn.Module]
) -> dict[str, nn.Module]:
    wanted = {id(target): target for target in targets}
    found = {name: _checked(name, m) for name, m in modules.items() if id(m) in wanted}
    missing = wanted.keys() - {id(module) for module in found.values()}
    if missing:
        strange = wanted[missing.pop()]
        what = type(strange).__name__
        raise ValueError(f"a target, {what}, is no module of this model")
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that a Hugging Face model calls its output embeddings."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None
