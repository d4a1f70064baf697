"""Which layers of a model a `LoRAConfig` means, and why the others are left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from .._utils.names import ALL_LINEAR, _filled, match_names, nearest, pattern_matches
from .._utils.peft_names import TASK_HEADS
from ..layers.kinds import is_linear
from .config import LoRAConfig


@dataclass
class Selection:
    """The layers to adapt by name, in the model's order.

    `aliases` are their other names, of those that appear more than once; `skipped` tells of every
    other linear layer why it is not adapted.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def select_layers(
    model: nn.Module, config: LoRAConfig, adaptable: Callable[[nn.Module], bool]
) -> Selection:
    """PEFT's rules: `target_modules`, less `exclude_modules`, `modules_to_save` and other layers
    than `layers_to_transform`.

    Raises:
        ValueError: nothing is left, or an option names what is not there (the nearest name is
            given).
        TypeError: a target is no layer that can be adapted.

    """
    candidates, aliases = find_candidates(model, adaptable)
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = set(_targeted(config, modules, candidates, aliases))
    names = {*candidates, *(alias for others in aliases.values() for alias in others)}
    left_out = _left_out(model, config, list(modules), list(candidates), aliases)
    selection = Selection()
    for name in candidates:
        if name in left_out:
            selection.skipped[name] = left_out[name]
        elif name not in chosen:
            selection.skipped[name] = "not among target_modules"
        else:
            selection.layers[name] = candidates[name]
            selection.aliases[name] = aliases[name]
    strange = [n for n, m in modules.items() if isinstance(m, nn.Linear) and not _is_part(n, names)]
    selection.skipped |= dict.fromkeys(strange, "its forward or its weight is not nn.Linear's")
    experts = [name for name, module in modules.items() if _is_experts(name, module)]
    selection.skipped |= dict.fromkeys(experts, "its experts are 3-D parameters, not linear layers")
    if not selection.layers:
        reasons = ", ".join(dict.fromkeys(selection.skipped.values())) or "it has no linear layer"
        raise ValueError(f"no layer of {type(model).__name__} is left to adapt: {reasons}")
    _check_patterns(config, selection.layers)
    return selection


def with_task_head(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The configuration with the head that its task trains in full among `modules_to_save`."""
    saved = tuple(config.modules_to_save or ())
    named = () if isinstance(config.target_modules, str) else config.target_modules
    endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    heads = tuple(
        head
        for head in TASK_HEADS.get(config.task_type, ())
        if head in endings and head not in saved and head not in named
    )
    return replace(config, modules_to_save=saved + heads) if heads else config


def find_candidates(
    model: nn.Module, adaptable: Callable[[nn.Module], bool]
) -> tuple[dict[str, nn.Module], dict[str, list[str]]]:
    """The layers that could be adapted, by the first name of each; and their other names."""
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    candidates: dict[str, nn.Module] = {}
    last = None
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in first:
            if first[id(module)] in candidates:
                aliases[first[id(module)]].append(name)
            continue
        first[id(module)] = name
        # What lies inside one, as the quantised layer in its wrapper, is a part of it.
        inside = last is not None and name.startswith(f"{last}.")
        if name and not inside and adaptable(module):
            last, candidates[name], aliases[name] = name, module, []
    return candidates, aliases


def match_modules(
    modules: Mapping[str, nn.Module], names: Sequence[str], option: str
) -> dict[str, nn.Module]:
    """The outermost modules of these names or endings; ValueError if one of them is none."""
    found = match_names(modules, names, option=option)
    return {n: modules[n] for n in found if not any(n.startswith(f"{o}.") for o in found)}


def _is_experts(name: str, module: nn.Module) -> bool:
    """Whether a module has the matrices of its experts in one parameter, as in transformers 5."""
    stacked = any(p is not None and p.dim() == 3 for p in module._parameters.values())
    return stacked and "expert" in f"{name} {type(module).__name__}".lower()


def _is_part(name: str, candidates: Collection[str]) -> bool:
    """Whether it is one of the candidates, or lies inside one."""
    parts = name.split(".")
    return any(".".join(parts[: k + 1]) in candidates for k in range(len(parts)))


def _targeted(
    config: LoRAConfig,
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, nn.Module],
    aliases: Mapping[str, Sequence[str]],
) -> Iterable[str]:
    """The candidates that `target_modules` means."""
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        return candidates
    found = match_names([n for n in modules if n], targets, candidates, option="target_modules")
    first = {alias: name for name, others in aliases.items() for alias in (name, *others)}
    for name in found:
        if name not in first:
            what = "is no linear layer that can be adapted"
            if isinstance(modules[name], nn.Linear):
                what = "has a forward or a weight that is not its own, and cannot be adapted"
            raise TypeError(
                f"target_modules names {name!r}, a {type(modules[name]).__name__}, which {what}"
            )
        if reason := _why_passed_by(modules, name):
            raise ValueError(f"target_modules names {name!r}, but {reason}")
    return [first[name] for name in found]


def _why_passed_by(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Why an adapter there would not count, if so: its block multiplies with the weight itself."""
    parent, _, key = name.rpartition(".")
    block = type(modules[parent]).__name__
    if key in ("x_proj", "dt_proj", "out_proj") and re.search("Mamba|Bamba|FalconH1Mixer", block):
        return f"its {block} reads the weight past the layer"
    return None


def _left_out(
    model: nn.Module,
    config: LoRAConfig,
    names: Sequence[str],
    candidates: Sequence[str],
    aliases: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    """Names of candidates that are targeted perhaps, but not adapted, with the reason."""
    reasons: dict[str, str] = {}
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        head, modules = output_head(model), dict(model.named_modules(remove_duplicate=False))
        for name in candidates:
            if head is not None and modules[name] is head:
                reasons[name] = "the output head, which 'all-linear' leaves out"
            elif reason := _why_passed_by(modules, name):
                reasons[name] = reason
    indices = config.layer_indices()
    if indices is not None:
        blocks = {name: _block_index(name, config.layers_pattern) for name in candidates}
        missing = set(indices) - set(blocks.values())
        if missing:
            known = sorted({block for block in blocks.values() if block is not None})
            raise ValueError(
                f"layers_to_transform names block {min(missing)}, but the numbers in this model's "
                f"names are {f'{known[0]} to {known[-1]}' if known else 'none'}"
            )
        for name in candidates:
            if blocks[name] not in indices:
                reasons[name] = "not among layers_to_transform"
    if config.exclude_modules:
        excluded = set(match_names(names, config.exclude_modules, option="exclude_modules"))
        for name in candidates:
            if excluded.intersection([name, *aliases.get(name, ())]):
                reasons[name] = "in exclude_modules"
    for saved in config.modules_to_save or ():
        for name in candidates:
            pattern = rf"(^|.*\.){re.escape(saved)}($|\..*)"
            if any(re.match(pattern, n) for n in (name, *aliases.get(name, ()))):
                reasons[name] = "in modules_to_save: trained in full"
    return reasons


def _block_index(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The number of the block that a layer is in: the first one in its name, as in PEFT."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or [r"[^.]*"]
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name)
        if match:
            return int(match[1])
    return None


def _check_patterns(config: LoRAConfig, layers: Mapping[str, nn.Module]) -> None:
    """Raises for a pattern that no layer matches: PEFT ignores it, and a misspelt one with it."""
    for option in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, option):
            if not any(pattern_matches(key, name) for name in layers):
                raise ValueError(
                    f"{option} has {key!r}, which matches no adapted layer{nearest(key, layers)}"
                )


Targets = str | Sequence[str] | Mapping[str, nn.Module] | Sequence[nn.Module]


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
