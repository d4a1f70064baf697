"""Renames an adapter's layers, for a server whose class holds the text model elsewhere:
`language_model.model.layers.0...` instead of `model.layers.0...`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..._utils.errors import did_you_mean
from ..._utils.names import match_names
from ...model.config import AdapterState, ExpertPart, LoRAConfig
from ..adapter.peft_format.reading import saved_module
from ..checkpoint.weights import is_all_linear

_SHOWN = 3  # names in an error


def renamed(state: AdapterState, old: str, new: str) -> AdapterState:
    """The same adapter with the prefix `new` in place of the prefix `old` in all names.

    The names of layers, the names of tensors that are trained in full, and the names in the
    configuration change; names that do not begin with `old` do not. The tensors are shared with
    `state`.

    Args:
        state: the adapter, which is not changed.
        old: a prefix of whole parts of names, with or without the final dot ("model.", "model");
            "" is the beginning of all names.
        new: the prefix that replaces it; "" removes the prefix.

    Raises:
        ValueError: no layer's name begins with `old`, a prefix has an empty part, or two names
            would be equal.

    """
    old, new = _prefix(old, "old"), _prefix(new, "new")
    if not any(_begins(name, old) for name in state.layers):
        raise ValueError(_not_found(old, list(state.layers)))
    layers = _moved(state.layers, old, new)
    extra, rows = _moved(state.extra, old, new), _moved(state.rows, old, new)
    names = dict(zip(state.layers, layers, strict=True))
    stacks = {name: names[name] for name, layer in state.layers.items() if layer.experts}
    config = _config(state.config, names, stacks, old, new)
    saved = _saved(state, old, new)
    config = replace(config, modules_to_save=saved)
    experts = {
        name: replace(stored, parts=tuple(_moved_part(part, old, new) for part in stored.parts))
        for name, stored in _moved(state.experts, old, new).items()
    }
    return replace(state, layers=layers, extra=extra, rows=rows, config=config, experts=experts)


def _moved_part(part: ExpertPart, old: str, new: str) -> ExpertPart:
    return replace(part, name=_move(part.name, old, new))


def _prefix(prefix: str, option: str) -> str:
    """The prefix without its final dot."""
    prefix = prefix.removesuffix(".")
    if prefix and not all(prefix.split(".")):
        raise ValueError(
            f"the {option} prefix {prefix!r} has an empty part: give whole parts of names, such as "
            "'model.' or 'language_model.model.'"
        )
    return prefix


def _not_found(old: str, names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
    beginnings = {
        ".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 1)
    }
    return (
        f"no layer's name begins with {f'{old}.'!r}; the first are {shown}"
        f"{did_you_mean(old, sorted(beginnings))}"
    )


def _begins(name: str, old: str) -> bool:
    return not old or name == old or name.startswith(f"{old}.")


def _move(name: str, old: str, new: str) -> str:
    """The name with the new prefix, if it has the old one."""
    if not _begins(name, old):
        return name
    rest = name.removeprefix(old).removeprefix(".")
    moved = f"{new}.{rest}" if new and rest else new or rest
    if not moved:
        raise ValueError(f"{name!r} would have no name without {old!r}")
    return moved


def _moved(named: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    before: dict[str, str] = {}
    for name, value in named.items():
        moved = _move(name, old, new)
        if moved in found:
            raise ValueError(f"{before[moved]!r} and {name!r} would both be called {moved!r}")
        found[moved], before[moved] = value, name
    return found


def _config(
    config: LoRAConfig, names: Mapping[str, str], stacks: Mapping[str, str], old: str, new: str
) -> LoRAConfig:
    """The configuration that selects the same layers by their new names (the values of `names`),
    with the same r and lora_alpha. `stacks` are those layers that are parameters of experts.

    Endings and patterns stay if they still select the same, as most do; otherwise the layers' full
    names replace them.
    """
    fields: dict[str, Any] = {
        "exclude_modules": config.exclude_modules,
        "target_modules": config.target_modules,
    }
    if not isinstance(config.target_modules, str):
        fields["target_modules"] = _listed(config.target_modules, old, new)
    if not isinstance(config.exclude_modules, str):
        fields["exclude_modules"] = _listed(config.exclude_modules, old, new)
    excluded = fields["exclude_modules"]
    linear = [now for name, now in names.items() if name not in stacks]
    if not _mean(fields["target_modules"], linear) or isinstance(excluded, str):
        # A regular expression for the old names says nothing about the new ones.
        fields |= {"target_modules": tuple(linear), "exclude_modules": None}
    if stacks:
        fields["target_parameters"] = _listed(config.target_parameters, old, new)
        if not _mean(fields["target_parameters"] or (), stacks.values()):
            fields["target_parameters"] = tuple(stacks.values())
    moved = replace(config, **fields)
    if any(moved.layer_rank(now) != config.layer_rank(name) for name, now in names.items()):
        ranks = {now: config.layer_rank(name) for name, now in names.items()}
        moved = replace(moved, rank_pattern=_exact(ranks, config.r))
    if any(moved.layer_alpha(now) != config.layer_alpha(name) for name, now in names.items()):
        alphas = {now: config.layer_alpha(name) for name, now in names.items()}
        moved = replace(moved, alpha_pattern=_exact(alphas, config.lora_alpha))
    if any(moved.layer_parts(now) != config.layer_parts(name) for name, now in names.items()):
        sizes = {now: config.layer_parts(name) for name, now in names.items()}
        moved = replace(moved, fused_parts=_exact(sizes, None))
    return moved


def _saved(state: AdapterState, old: str, new: str) -> tuple[str, ...] | None:
    """`modules_to_save` with the new names of the same modules."""
    before = state.config.modules_to_save
    if before is None:
        return None
    found = dict.fromkeys(_listed(before, old, new) or ())
    for key in state.extra:
        owner, _, last = key.rpartition(".")
        module = saved_module(owner, before, last != "bias")
        if module is not None and saved_module(_move(module, old, new), tuple(found)) is None:
            found[_move(module, old, new)] = None
    return tuple(found)


def _listed(values: Iterable[str] | None, old: str, new: str) -> tuple[str, ...] | None:
    """The renamed entries of a list of names and endings; if `old` is "", all are endings."""
    if values is None:
        return None
    return tuple(_move(value, old, new) if old else value for value in values)


def _mean(targets: str | tuple[str, ...], names: Iterable[str]) -> bool:
    """Whether the targets match all these names, and each entry of a list matches one of them."""
    names = list(names)
    if is_all_linear(targets) or not targets:
        return bool(targets) or not names
    try:
        return match_names(names, targets) == names
    except ValueError:
        return False


def _exact(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """{pattern of a layer: value} for the layers whose value is not the default."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}
