"""What only the model can tell about an adapter of experts: whether the experts are in one
parameter, and the orientation of that parameter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ....._utils.names import without_wrappers
from .....layers.options import lora_scaling
from .....layers.state import LayerState
from .....model.config import AdapterState, ExpertPart, LoRAConfig
from ..reading import with_own_ranks
from .layouts import EACH, Pair
from .naming import stored_experts
from .reading import empty_stacks, exchanged

_EXPERT = re.compile(r"(.+)\.experts\.\d+\.[^.]+")


def placed(state: AdapterState, model: nn.Module) -> AdapterState:
    """Fits the adapter to the model. Experts that are linear layers in the adapter and one
    parameter in the model become one layer, and A and B get the orientation of the parameter. The
    model may be on the meta device.

    An expert that the adapter does not have gets an update of zero.

    Raises:
        ValueError: experts of one parameter have different ranks or s, or sizes that do not fit; or
            the orientation of A and B is ambiguous.

    """
    return _joined(_oriented(state, model), model)


def _oriented(state: AdapterState, model: nn.Module) -> AdapterState:
    """The adapter with A and B for [E, out, in]; an older PEFT may have exchanged them."""
    layers, experts = dict(state.layers), dict(state.experts)
    parameters, modules = _parameters(model), _modules(model)
    for name, stored in state.experts.items():
        if stored.exchanged is False or name not in layers:
            continue
        weight, owner = parameters.get(name), modules.get(name.rpartition(".")[0])
        if weight is None:  # loading will report that the model does not have it
            continue
        transposed = bool(getattr(owner, "is_transposed", False))
        if _is_exchanged(name, layers[name], weight, transposed, stored.exchanged):
            lora_A, lora_B = exchanged(layers[name].lora_A, layers[name].lora_B)
            layers[name] = replace(layers[name], lora_A=lora_A, lora_B=lora_B)
        experts[name] = replace(stored, exchanged=False)
    return replace(state, layers=layers, experts=experts)


def _is_exchanged(
    name: str, layer: LayerState, weight: Tensor, transposed: bool, flipped: bool | None
) -> bool:
    shape = tuple(weight.shape[:0:-1]) if transposed else tuple(weight.shape[1:])
    if shape != shape[::-1]:
        return layer.shape == shape[::-1]
    if transposed:  # all versions of PEFT write this case alike
        return False
    if flipped is None:
        raise ValueError(
            f"the experts {name!r} have square matrices, {list(shape)}, so that the shapes do not "
            "tell whether PEFT before 0.19 wrote A and B, which exchanged them: write the version "
            'into adapter_config.json, as "peft_version": "0.18.0" or "0.19.0"'
        )
    return flipped


def _joined(state: AdapterState, model: nn.Module) -> AdapterState:
    """Makes one layer of the experts that are one parameter in the model."""
    modules = _modules(model)
    single = [name for name in state.layers if _EXPERT.fullmatch(name) and name not in modules]
    if not single:
        return state
    stored = stored_experts(model)
    layers, joined, parameters = dict(state.layers), {}, _parameters(model)
    for parameter, known in stored.items():
        number = parameters[parameter].shape[0]
        names = [name for part in known.parts for name in part.names(number)]
        found = {name: layers.pop(name) for name in names if name in layers}
        if found:
            rule = state.config.scaling_rule
            joined[parameter] = _stack(parameter, found, known.parts, number, rule)
    if not joined:
        return state
    for name in empty_stacks({n: (s.lora_A, s.lora_B) for n, s in (layers | joined).items()}):
        joined.pop(name, None)
    experts = {name: replace(known, layout=EACH) for name, known in stored.items()}
    linear, layers = list(layers), layers | joined
    config = _with_parameters(state.config, linear, list(joined))
    config = with_own_ranks(config, layers)
    return replace(state, config=config, layers=layers, experts=state.experts | experts)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {without_wrappers(name): parameter for name, parameter in model.named_parameters()}


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {without_wrappers(name): module for name, module in model.named_modules()}


def _with_parameters(
    config: LoRAConfig, linear: Sequence[str], parameters: list[str]
) -> LoRAConfig:
    """The configuration with these parameters, and without targets that match no linear layer."""
    targets = config.target_modules
    if targets is not None and not isinstance(targets, str):
        targets = tuple(t for t in targets if _matches(linear, t))
    elif not linear:
        targets = ()
    return replace(
        config,
        target_modules=targets,
        target_parameters=(*(config.target_parameters or ()), *parameters),
    )


def _matches(names: Sequence[str], target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _stack(
    parameter: str,
    layers: Mapping[str, LayerState],
    parts: Sequence[ExpertPart],
    number: int,
    rule: str,
) -> LayerState:
    """Joins the experts' linear layers into one layer. The rank does not change if the parts of
    each expert have the same A; otherwise the ranks of the parts add up: A = [A₁; A₂], and B is
    block-diagonal.
    """
    if len({(layer.r, layer.scaling) for layer in layers.values()}) > 1:
        raise ValueError(
            f"the experts of {parameter!r} have different ranks or s in this adapter, and are one "
            "parameter of this model, which has one of each"
        )
    first = next(iter(layers.values()))
    if any(layer.lora_magnitude is not None for layer in layers.values()):
        raise ValueError(
            f"the experts of {parameter!r} are DoRA adapters (use_dora) of linear layers, and are "
            "one parameter of this model, for which DoRA is not implemented: merge the adapter "
            "with a version of transformers that has them as linear layers"
        )
    pairs = {part: _of_part(layers, part, number) for part in parts}
    found = {part: pair for part, pair in pairs.items() if pair is not None}
    rights = [right for right, _ in found.values()]
    same = all(torch.equal(rights[0], right) for right in rights[1:])
    right = rights[0] if same else torch.cat(rights, dim=1)
    r, k = right.shape[1], rights[0].shape[1]
    left = right.new_zeros(number, max(part.stop for part in parts), r)
    for index, (part, (_, rows)) in enumerate(found.items()):
        begin = 0 if same else index * k
        left[:, part.start : part.stop, begin : begin + k] = rows
    alpha = first.scaling / lora_scaling(1.0, r, rule)
    return LayerState(right, left, first.scaling, alpha)


def _of_part(layers: Mapping[str, LayerState], part: ExpertPart, number: int) -> Pair | None:
    """A [E, r, in] and B [E, rows, r] of one part; None if no expert has this part."""
    names = part.names(number)
    pairs = {name: layers[name].update_factors() for name in names if name in layers}
    if not pairs:
        return None
    (name, (A, B)), rows = next(iter(pairs.items())), part.stop - part.start
    if len({(A.shape, B.shape) for A, B in pairs.values()}) > 1 or len(B) != rows:
        raise ValueError(
            f"lora_B of {name!r} is {list(B.shape)}, this model has {rows} rows there, or its "
            "experts have different shapes"
        )
    zeros = torch.zeros_like(A), torch.zeros_like(B)
    rights, lefts = zip(*(pairs.get(name, zeros) for name in names), strict=True)
    return torch.stack(rights), torch.stack(lefts)
