"""Selects 3-D parameters of experts by `target_parameters`, says how to adapt those that are left
out, and leaves the experts' routers frozen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..._utils.names import match_names
from ...layers.adapter import Adapter
from ...layers.base import BaseLayer
from ..config import LoRAConfig
from ..experts.kinds import is_experts, projections, why_not_adaptable

NOT_LINEAR = "its experts are 3-D parameters, not linear layers"
_ROUTER = re.compile(r"(.*_)?(router|gate|wg)")


def targeted_parameters(
    model: nn.Module,
    config: LoRAConfig,
    candidates: Mapping[str, BaseLayer],
    aliases: Mapping[str, Sequence[str]],
) -> list[str]:
    """The candidates that `target_parameters` names, by their whole names or endings.

    Raises:
        ValueError: a name matches no parameter, or one that cannot be adapted, with the reason.

    """
    if not config.target_parameters:
        return []
    parameters = [
        f"{path}.{key}" if path else key
        for path, module in model.named_modules(remove_duplicate=False)
        for key in ({} if isinstance(module, Adapter) else module._parameters)
    ]
    first = {alias: name for name, others in aliases.items() for alias in (name, *others)}
    stacks = [name for name in candidates if candidates[name].num_experts is not None]
    found = match_names(parameters, config.target_parameters, stacks, option="target_parameters")
    for name in found:
        if name not in first or first[name] not in stacks:
            raise ValueError(f"target_parameters names {name!r}, but {_why_not(model, name)}")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, reason in _used_by_others(modules, [first[name] for name in found]).items():
        raise ValueError(f"target_parameters names {name!r}, but {reason}")
    return [first[name] for name in found]


def _why_not(model: nn.Module, name: str) -> str:
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    if is_experts(path, owner):
        reason = why_not_adaptable(owner)
        return reason or f"{key!r} is none of {', '.join(projections(owner))}"
    what = "a linear layer's: name the layer in target_modules"
    if not isinstance(owner, nn.Linear):
        what = f"of a {type(owner).__name__}, and only 3-D parameters of experts can be adapted"
    return f"this parameter is {what}"


def left_out(
    config: LoRAConfig,
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, BaseLayer],
    chosen: set[str],
) -> dict[str, str]:
    """The modules whose experts are not adapted, with what would adapt them, or why nothing does;
    also single parameters that are not adapted in the other modules.
    """
    reasons: dict[str, str] = {}
    adaptable: dict[str, list[str]] = {}
    for name, module in modules.items():
        if not is_experts(name, module):
            continue
        reason = why_not_adaptable(module)
        if reason is None:
            own = [f"{name}.{parameter}" for parameter in projections(module)]
            own = [parameter for parameter in own if parameter in candidates]
            missing = [parameter for parameter in own if parameter not in chosen]
            if missing == own:
                adaptable[name] = missing
            else:
                reasons |= dict.fromkeys(missing, "not among target_parameters")
        elif type(module).__module__.startswith("transformers."):
            reasons[name] = reason
        else:
            reasons[name] = NOT_LINEAR
    used = _used_by_others(modules, adaptable)
    reasons |= {name: used[name] for name in adaptable if name in used}
    free = {name: own for name, own in adaptable.items() if name not in used}
    reasons |= dict.fromkeys(free, _how_to_adapt(config, candidates, free))
    return reasons


def _how_to_adapt(
    config: LoRAConfig,
    candidates: Mapping[str, BaseLayer],
    adaptable: Mapping[str, Sequence[str]],
) -> str:
    names = [name for own in adaptable.values() for name in own]
    endings = list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in names))
    count = 0
    for name in names:
        base, r = candidates[name], config.layer_rank(name)
        count += (base.num_experts or 0) * r * sum(base.shape)
    return (
        f"{NOT_LINEAR}: target_parameters={endings} adapts them, with {count:,} parameters "
        f"(r={config.r})"
    )


def _used_by_others(modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, str]:
    """{name: reason} of experts, or of their parameters, that a kernel from the Hub uses without
    calling the experts' module.
    """
    kernels = {
        path: getattr(type(block), "kernel_layer_name", None)
        for path, block in modules.items()
        if "forward" in vars(block)
    }
    return {
        name: f"the hub kernel {kernel} multiplies with its experts directly, without their "
        "adapters: load the model with use_kernels=False"
        for name in names
        for path, kernel in kernels.items()
        if kernel is not None and name.startswith(f"{path}.")
    }


def routers(
    modules: Mapping[str, nn.Module], candidates: Mapping[str, BaseLayer]
) -> dict[str, str]:
    """The linear layers that choose among experts, with the reason why "all-linear" leaves them
    out.
    """
    reasons: dict[str, str] = {}
    for path, module in modules.items():
        if not is_experts(path, module) or why_not_adaptable(module) is not None:
            continue
        block, count = path.rpartition(".")[0], _count(module)
        inside = f"{block}." if block else ""
        for name, base in candidates.items():
            if base.num_experts is not None or not name.startswith(inside):
                continue
            parts = name.removeprefix(inside).split(".")
            if base.shape[0] == count and any(_ROUTER.fullmatch(part) for part in parts):
                reasons[name] = (
                    "a router of experts, which 'all-linear' leaves frozen: name it in "
                    "target_modules to adapt it"
                )
    return reasons


def _count(experts: nn.Module) -> int:
    weight = experts._parameters[projections(experts)[1]]
    return 0 if weight is None else weight.shape[0]
