"""Selects a model's layers by a `LoRAConfig` or by `targets`; gives reasons for the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from ..._utils.names import ALL_LINEAR, match_names, nearest, pattern_matches
from ..._utils.peft_names import TASK_HEADS
from ...layers.adapted import AdaptedLayer
from ...layers.adapter import Adapter
from ...layers.base import BaseLayer, base_of
from ...layers.kinds import ATTENTION, NAMED_KINDS, OUT_PROJECTION, why_not_named
from ..config import LoRAConfig
from ..experts.base import experts_bases
from ..experts.kinds import is_experts
from .bypassed import bypassed_layers
from .experts import left_out, routers, targeted_parameters

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Targets = str | Sequence[str] | Mapping[str, nn.Module] | Sequence[nn.Module]


@dataclass
class Selection:
    """The layers to adapt by name, in the model's order.

    `aliases` has the further names of each layer that appears more than once; `skipped` has the
    reason why each other linear layer is not adapted.
    """

    layers: dict[str, BaseLayer] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def select_layers(model: nn.Module, config: LoRAConfig) -> Selection:
    """Selects layers by PEFT's rules: those of `target_modules`, and the experts' parameters of
    `target_parameters`, that are in `layers_to_transform`, and in neither `exclude_modules` nor
    `modules_to_save`.

    Raises:
        ValueError: no layer is selected, or an option contains a name that the model does not have
            (the nearest name is given).
        TypeError: a target is not a layer that can be adapted.

    """
    candidates, aliases = find_candidates(model)
    modules = without_adapters(model)
    bypassed = bypassed_layers(model)
    linear = {name: base for name, base in candidates.items() if base.num_experts is None}
    chosen = set(_targeted(config, modules, linear, aliases, bypassed))
    # An embedding or the like that is not named is not reported as skipped either.
    candidates = {n: b for n, b in candidates.items() if b.kind not in NAMED_KINDS or n in chosen}
    linear = {n: b for n, b in linear.items() if n in candidates}
    parameters = set(targeted_parameters(model, config, candidates, aliases))
    names = {*linear, *(alias for name in linear for alias in aliases[name])}
    known = [*modules, *parameters]
    skip_reasons = _skip_reasons(model, config, known, candidates, aliases, bypassed)
    chosen |= parameters
    selection = Selection()
    for name in candidates:
        if name not in linear and name not in chosen:
            continue  # `left_out` gives the reason
        if name in skip_reasons:
            selection.skipped[name] = skip_reasons[name]
        elif name not in chosen:
            selection.skipped[name] = "not among target_modules"
        else:
            selection.layers[name] = candidates[name]
            selection.aliases[name] = aliases[name]
    strange = [n for n, m in modules.items() if isinstance(m, nn.Linear) and not _is_part(n, names)]
    selection.skipped |= dict.fromkeys(strange, "its forward or its weight is not nn.Linear's")
    selection.skipped |= left_out(config, modules, candidates, parameters)
    if not selection.layers:
        reasons = ", ".join(dict.fromkeys(selection.skipped.values())) or "it has no linear layer"
        raise ValueError(f"no layer of {type(model).__name__} is left to adapt: {reasons}")
    _check_patterns(config, selection.layers)
    return selection


def without_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their names, without the adapters, because no option refers to these."""
    modules = dict(model.named_modules(remove_duplicate=False))
    own = {id(module.adapters) for module in modules.values() if isinstance(module, AdaptedLayer)}
    return {n: m for n, m in modules.items() if not isinstance(m, Adapter) and id(m) not in own}


def with_task_head(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """The configuration with the task's head added to `modules_to_save`, as PEFT does."""
    saved = tuple(config.modules_to_save or ())
    targets = config.target_modules or ()
    named = () if isinstance(targets, str) else targets
    endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    heads = tuple(
        head
        for head in TASK_HEADS.get(config.task_type or "", ())
        if head in endings and head not in saved and head not in named
    )
    return replace(config, modules_to_save=saved + heads) if heads else config


def find_candidates(model: nn.Module) -> tuple[dict[str, BaseLayer], dict[str, list[str]]]:
    """The layers that can be adapted, by the first name of each, and their further names. Experts
    are one layer for each of their 3-D parameters, with the parameter's name.
    """
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    candidates: dict[str, BaseLayer] = {}
    last = None
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in first:
            if first[id(module)] in candidates:
                aliases[first[id(module)]].append(name)
            for parameter in experts_bases(first[id(module)], module):
                aliases[parameter].append(f"{name}.{parameter.rpartition('.')[2]}")
            continue
        first[id(module)] = name
        if is_experts(name, module):
            stacks = experts_bases(name, module)
            candidates |= stacks
            aliases |= {parameter: [] for parameter in stacks}
            continue
        # A layer inside another one, such as the quantized layer in its wrapper, is a part of it.
        inside = last is not None and name.startswith(f"{last}.")
        if name and not inside and (base := base_of(module)) is not None:
            candidates[name], aliases[name] = base, []
            if base.kind != ATTENTION:  # whose out_proj is a layer of its own
                last = name
    return candidates, aliases


def without_named(candidates: Mapping[str, BaseLayer]) -> dict[str, BaseLayer]:
    """The candidates without those that are adapted only if they are named: embeddings,
    convolutions and attentions.
    """
    return {name: base for name, base in candidates.items() if base.kind not in NAMED_KINDS}


def with_projections(
    names: Collection[str], candidates: Mapping[str, BaseLayer], option: str
) -> list[str]:
    """The names, and those of the attentions' `out_proj`, which are adapted with them as in PEFT.

    Raises:
        TypeError: `option` names an `out_proj` alone.

    """
    found: list[str] = []
    for name in names:
        base, (owner, _, _) = candidates.get(name), name.rpartition(".")
        if base is not None and base.kind == OUT_PROJECTION:
            if owner not in names:
                raise TypeError(
                    f"{option} names {name!r}, which nn.MultiheadAttention does not call: name "
                    f"{owner!r}, which adapts both"
                )
            continue
        found.append(name)
        projection = f"{name}.out_proj"
        if base is not None and base.kind == ATTENTION and projection in candidates:
            found.append(projection)
    return found


def match_modules(
    modules: Mapping[str, nn.Module], names: Sequence[str], option: str
) -> dict[str, nn.Module]:
    """The outermost modules with these names or endings.

    Raises:
        ValueError: a name matches no module; `option` is the option that contains it.

    """
    found = match_names(modules, names, option=option)
    return {n: modules[n] for n in found if not any(n.startswith(f"{o}.") for o in found)}


def _is_part(name: str, candidates: Collection[str]) -> bool:
    """Whether `name` is one of the candidates or of a module inside one."""
    parts = name.split(".")
    return any(".".join(parts[: k + 1]) in candidates for k in range(len(parts)))


def _targeted(
    config: LoRAConfig,
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, BaseLayer],
    aliases: Mapping[str, Sequence[str]],
    bypassed: Mapping[str, str],
) -> Iterable[str]:
    """The candidates that `target_modules` selects."""
    targets, linear = config.target_modules, without_named(candidates)
    if _is_all_linear(targets):
        return linear
    if not targets:  # target_parameters alone
        return []
    option = "target_modules"
    found = match_names([n for n in modules if n], targets, linear, option=option)
    first = {alias: name for name, others in aliases.items() for alias in (name, *others)}
    for name in found:
        if name not in first:
            what = "is no linear layer that can be adapted"
            if is_experts(name, modules[name]):
                what = "has 3-D parameters, which target_parameters names"
            module = modules[name]
            if isinstance(module, nn.Linear):
                what = "has a forward or a weight that is not its own, and cannot be adapted"
            elif (reason := why_not_named(module)) is not None:
                what = f"cannot be adapted: {reason}"
            raise TypeError(
                f"target_modules names {name!r}, a {type(modules[name]).__name__}, which {what}"
            )
        if name in bypassed:
            raise ValueError(f"target_modules names {name!r}, but {bypassed[name]}")
    return with_projections(list(dict.fromkeys(first[name] for name in found)), candidates, option)


def _skip_reasons(
    model: nn.Module,
    config: LoRAConfig,
    names: Sequence[str],
    candidates: Mapping[str, BaseLayer],
    aliases: Mapping[str, Sequence[str]],
    bypassed: Mapping[str, str],
) -> dict[str, str]:
    """Candidates that an option excludes, whether targeted or not, with the reason."""
    reasons: dict[str, str] = {}
    if _is_all_linear(config.target_modules):
        reasons |= _too_small(config, candidates)
        linear = {name: base for name, base in candidates.items() if base.num_experts is None}
        reasons |= _not_in_all_linear(model, linear, bypassed)
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
            own = [name, *aliases.get(name, ())]
            if candidates[name].num_experts is not None:  # or the module of the parameter
                own += [n.rpartition(".")[0] for n in own]
            if excluded.intersection(own):
                reasons[name] = "in exclude_modules"
    for saved in config.modules_to_save or ():
        for name in candidates:
            pattern = rf"(^|.*\.){re.escape(saved)}($|\..*)"
            if any(re.match(pattern, n) for n in (name, *aliases.get(name, ()))):
                reasons[name] = "in modules_to_save: trained in full"
    return reasons


def _too_small(config: LoRAConfig, candidates: Mapping[str, BaseLayer]) -> dict[str, str]:
    """The layers that are too small for `r` and whose rank no pattern sets, with the reason."""
    reasons: dict[str, str] = {}
    for name, base in candidates.items():
        if base.num_experts is not None:  # experts are selected only by name
            continue
        if base.rewritable and base.stored_weight.dim() != 2:  # a shard, which is refused later
            continue
        full = min(base.shape)
        named = any(pattern_matches(key, name) for key in config.rank_pattern)
        if config.r > full and not named:
            reasons[name] = f"r = {config.r} is larger than min(out, in) = {full}"
    return reasons


def _block_index(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The number of a layer's block, the first number in the layer's name, as in PEFT."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern or [r"[^.]*"]
    for pattern in patterns:
        match = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name)
        if match:
            return int(match[1])
    return None


def _check_patterns(config: LoRAConfig, layers: Mapping[str, BaseLayer]) -> None:
    """Raises ValueError for a pattern that matches no layer, such as a misspelled one; PEFT ignores
    such patterns.
    """
    by_peft = [base.pattern_name(name) for name, base in layers.items()]
    known = {"rank_pattern": by_peft, "alpha_pattern": by_peft, "fused_parts": list(layers)}
    for option, names in known.items():
        for key in getattr(config, option):
            if not any(pattern_matches(key, name) for name in names):
                raise ValueError(
                    f"{option} has {key!r}, which matches no adapted layer{nearest(key, names)}"
                )


def find_targets(model: nn.Module, targets: Targets = ALL_LINEAR) -> dict[str, BaseLayer]:
    """The targeted linear layers by name, in the model's order; adapted and quantized ones too.

    Args:
        model: the model. A module with several names is returned under each of them.
        targets: "all-linear", the layers that `add_lora` adapts by this name; another string, a
            regular expression that matches the whole name; a list of names or of their last parts
            ("q_proj", "mlp.up_proj"); a list of the modules themselves, or a dict {name: module}.

    Raises:
        ValueError: nothing matches, an entry of the list matches nothing (the nearest name is
            given), or a module is not in the model.
        TypeError: a target is not a linear layer that can be adapted.

    """
    if not targets:
        raise ValueError("targets is empty: give names, or 'all-linear'")
    modules = without_adapters(model)
    if isinstance(targets, Mapping):
        given = {name: _checked(name, module) for name, module in targets.items()}
        return _with_owners(given)
    if _has_modules(targets):
        return _with_owners(_names_of(modules, targets))
    candidates, aliases = find_candidates(model)
    bases = {name: base for first, base in candidates.items() for name in (first, *aliases[first])}
    if (root := base_of(model)) is not None:
        bases[""] = root
    order = [*modules, *(name for name, base in bases.items() if base.num_experts is not None)]
    bases = {name: bases[name] for name in order if name in bases}  # in the model's order
    if not _is_all_linear(targets):
        names = match_names(order, targets, list(without_named(bases)))
        names = with_projections(names, bases, "targets")
        return {name: bases.get(name) or _checked(name, modules[name]) for name in names}
    linear = {n: b for n, b in without_named(bases).items() if b.num_experts is None}
    skip_reasons = _not_in_all_linear(model, linear, bypassed_layers(model))
    found = {name: base for name, base in linear.items() if name not in skip_reasons}
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer")
    return found


def _has_modules(
    targets: str | Sequence[str] | Sequence[nn.Module],
) -> TypeIs[Sequence[nn.Module]]:
    return not isinstance(targets, str) and any(isinstance(t, nn.Module) for t in targets)


def _is_all_linear(targets: object) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _not_in_all_linear(
    model: nn.Module, layers: Mapping[str, BaseLayer], bypassed: Mapping[str, str]
) -> dict[str, str]:
    """The linear layers that "all-linear" does not select, with the reason."""
    head, modules = output_head(model), dict(model.named_modules(remove_duplicate=False))
    reasons = routers(modules, layers)
    for name in layers:
        if head is not None and modules[name] is head:
            reasons[name] = "the output head, which 'all-linear' leaves out"
        elif name in bypassed:
            reasons[name] = bypassed[name]
    return reasons


def _checked(name: str, module: nn.Module) -> BaseLayer:
    base = base_of(module)
    if base is None:
        raise TypeError(
            f"{name!r} is {type(module).__name__}; a target must be a linear layer that computes "
            "x Wᵀ + b from a weight of its own, or an embedding, a convolution or an attention"
        )
    return base


def _with_owners(layers: dict[str, BaseLayer]) -> dict[str, BaseLayer]:
    """The layers; TypeError for an attention's `out_proj` without the attention."""
    with_projections(list(layers), layers, "targets")
    return layers


def _names_of(
    modules: Mapping[str, nn.Module], targets: Sequence[nn.Module]
) -> dict[str, BaseLayer]:
    wanted = {id(target): target for target in targets}
    found = {name: _checked(name, m) for name, m in modules.items() if id(m) in wanted}
    missing = wanted.keys() - {id(base.module) for base in found.values()}
    if missing:
        what = type(wanted[missing.pop()]).__name__
        raise ValueError(f"a target, {what}, is no module of this model")
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """A Hugging Face model's output embeddings; None if the model has none."""
    return _embeddings(model, "get_output_embeddings")


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """A Hugging Face model's input embeddings; None if the model has none."""
    return _embeddings(model, "get_input_embeddings")


def _embeddings(model: nn.Module, method: str) -> nn.Module | None:
    get = getattr(model, method, None)
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # vision and audio models, for example
        return None
    return found if isinstance(found, nn.Module) else None
