"""What engines require of experts that have a pair of matrices each, and how files of PEFT and
Unsloth may be wrong for experts that share one pair.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ....model.experts.kinds import is_experts
from ...adapter.peft_format.experts.naming import is_converted_by_peft, stored_experts
from ...adapter.peft_format.experts.reading import (
    MARKER,
    certain_exchanges,
    is_by_unsloth,
    is_flipped,
)
from ..remedies import TO_EACH, TO_STACKED, WHOLE
from ..stored import StoredAdapter, names_in_brief, plain_name
from ..updates import experts_of, option_name
from .model import MISSING, BaseModel
from .verdict import Applied, Ignored, Verdict

_EACH = re.compile(r"(.+\.experts)\.(\d+)\.([^.]+)")
_WORDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FIRST = frozenset({"gate_proj", "up_proj"})
_PROJECTIONS = _FIRST | {"down_proj"}
_ORDER = "grouped_by_expert"  # Unsloth's order of B's columns
_CONVERT = "lora-kernels convert ADAPTER OUT --base BASE"


@dataclass(frozen=True)
class EachExpert:
    """Experts of one module that have a pair of matrices each.

    Attributes:
        projections: {number of an expert: its adapted projections}, by the words of most models
            ("gate_proj").
        names: the names of the experts' layers in the adapter.
        module: the base's module that has the experts in one parameter; None if unknown.

    """

    projections: Mapping[int, frozenset[str]]
    names: tuple[str, ...]
    module: nn.Module | None

    @property
    def expected(self) -> frozenset[str]:
        """The projections that each expert should have."""
        gated = any("gate_proj" in own for own in self.projections.values())
        if self.module is not None:
            gated = bool(getattr(self.module, "has_gate", True))
        elif not gated:  # an adapter with only "up_proj" and "down_proj" does not show it
            gated = not any(own >= {"up_proj", "down_proj"} for own in self.projections.values())
        return _PROJECTIONS if gated else _PROJECTIONS - {"gate_proj"}

    @property
    def number(self) -> int:
        """The number of experts, as far as it is known."""
        parameters = [] if self.module is None else list(self.module.parameters(recurse=False))
        sizes = [p.shape[0] for p in parameters if p.dim() == 3]
        return max([max(self.projections) + 1, *sizes])

    def is_whole(self, projections: frozenset[str]) -> bool:
        """Whether all experts have these projections."""
        return all(self.projections.get(e, frozenset()) >= projections for e in range(self.number))


def each_expert(adapter: StoredAdapter, base: BaseModel | None) -> dict[str, EachExpert]:
    """The experts that have a pair of matrices each, by the names of their modules."""
    found: dict[str, dict[int, set[str]]] = {}
    names: dict[str, list[str]] = {}
    for name in adapter.layers:
        match = _EACH.fullmatch(name)
        if match:
            own = found.setdefault(match[1], {}).setdefault(int(match[2]), set())
            own.add(_WORDS.get(match[3], match[3]))
            names.setdefault(match[1], []).append(name)
    return {
        module: EachExpert(
            {e: frozenset(words) for e, words in own.items()},
            tuple(names[module]),
            _experts_module(base, module, names[module][0]),
        )
        for module, own in found.items()
    }


def _experts_module(base: BaseModel | None, name: str, layer: str = "") -> nn.Module | None:
    """The base's module that has its experts in one parameter; `layer` is one of the experts."""
    if base is None or not base.modules:
        return None
    place = base.place(name)
    found = place.name or ""
    if place.kind == MISSING:  # the layer may have an older name, which stands for a parameter
        found = base.older.get(layer, "").rpartition(".")[0]
    module = base.modules.get(found)
    return module if module is not None and is_experts(found, module) else None


def to_each(verdict: Verdict, base: BaseModel | None) -> str:
    """The remedy: give each expert a pair of matrices, or merge if the base's files do not."""
    if base is None or base.architecture is None:
        return TO_EACH
    stored = stored_experts(base.architecture.model)
    return TO_EACH if stored and all(s.parts for s in stored.values()) else verdict.merge


def refuse_incomplete(
    verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None, why: str
) -> None:
    """Refuses missing experts or projections, for an engine that needs all of them."""
    lacking = [m for m, e in each_expert(adapter, base).items() if not e.is_whole(e.expected)]
    if lacking:
        verdict.refuse(
            f"{why}: all projections of every expert must be adapted, which they are not in "
            f"{names_in_brief(lacking)}",
            WHOLE,
        )


def refuse_joined_experts(
    verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None, what: str
) -> None:
    """Refuses experts in one tensor, for an engine that looks up a `what` by each layer's name."""
    found = [name for name, layer in adapter.layers.items() if experts_of(adapter, layer) > 1]
    if found:
        verdict.refuse(
            f"experts in one tensor (target_parameters) match no {what}: {names_in_brief(found)}",
            to_each(verdict, base),
        )


def left_bare_by_peft(
    verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None
) -> dict[str, Ignored]:
    """The layers of experts with a pair of matrices each that PEFT does not adapt, because the
    model has the experts in one parameter. Refuses pairs that PEFT cannot stack.
    """
    bare: dict[str, Ignored] = {}
    model: Any = None if base is None or base.architecture is None else base.architecture.model
    for module, experts in each_expert(adapter, base).items():
        if experts.module is None:
            continue
        own = frozenset().union(*experts.projections.values())
        if not is_converted_by_peft(model):
            reason = (
                f"PEFT does not convert the pairs of each expert of {type(model).__name__}: a "
                "warning tells of missing adapter keys"
            )
            bare |= dict.fromkeys(experts.names, Ignored(reason, remedy=TO_STACKED))
        elif 0 < len(own & _FIRST) < 2 or not experts.is_whole(own):
            verdict.refuse(
                "PEFT stacks the factors of all experts, gate over up: some are missing in "
                f"{module}",
                WHOLE,
            )
        elif "down_proj" not in own and not _targets_down(adapter.config):
            reason = "PEFT gives gate and up alone a name that the model does not have"
            bare |= dict.fromkeys(experts.names, Ignored(reason, remedy=WHOLE))
    return bare


def _targets_down(config: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts the experts' down_proj too, even if the file does not have it."""
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        return True
    return any(str(target).rpartition(".")[2] in ("down_proj", "w2") for target in targets)


def refuse_doubled_rank(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    """Refuses stacked experts together with targets that PEFT also takes for those of experts."""
    model = None if base is None or base.architecture is None else base.architecture.model
    if not is_converted_by_peft(model):
        return
    targets = adapter.config.get("target_modules") or ()
    ends = {str(target).rpartition(".")[2] for target in targets if not isinstance(targets, str)}
    joined = [n for n, layer in adapter.layers.items() if experts_of(adapter, layer) > 1]
    if joined and ends & {"w1", "gate_proj"} and ends & {"w3", "up_proj"}:
        verdict.refuse(
            "PEFT takes gate_proj and up_proj in target_modules for those of the experts, and "
            f"doubles the rank of gate_up_proj, which then does not fit: {names_in_brief(joined)}",
            verdict.merge,
        )


def judge_layouts(verdict: Verdict, adapter: StoredAdapter, base: BaseModel | None) -> None:
    """Corrects the verdict on experts in one tensor. All engines read the layout of PEFT 0.19 and
    later, but the file may have another one.
    """
    shapes = {
        name: layer.shape
        for name, layer in adapter.layers.items()
        if experts_of(adapter, layer) > 1
    }
    if not shapes:
        return
    _refuse_exchanged(verdict, adapter, base, shapes)
    marker = adapter.config.get(MARKER)
    if marker == _ORDER:
        _fault(
            verdict,
            list(shapes),
            "Unsloth before September 2026 wrote it: each expert gets columns of others' lora_B",
            "lora-kernels convert ADAPTER OUT",
        )
    elif marker is None and is_by_unsloth(adapter.config):
        verdict.notes.append(
            "if Unsloth wrote it before September 2026, the columns of the experts' lora_B are in "
            "another order, which nothing in the files tells: lora-kernels convert ADAPTER OUT "
            "--expert-order slowest"
        )


def _refuse_exchanged(
    verdict: Verdict,
    adapter: StoredAdapter,
    base: BaseModel | None,
    shapes: Mapping[str, tuple[int, int]],
) -> None:
    """Refuses files of PEFT before 0.19, and shapes that differ from the base's."""
    names = {option_name(adapter.config, adapter.layers[name]): name for name in shapes}
    try:
        certain = certain_exchanges({p: shapes[n] for p, n in names.items()}, None)
    except ValueError as error:
        verdict.refuse(str(error), "use the file that was saved with this configuration")
        return
    crossed: list[str] = []
    square: list[str] = []
    wrong: list[str] = []
    for parameter, name in names.items():
        there = _shape_in(base, name, parameter.rpartition(".")[2])
        exchanged = certain.get(parameter)
        if there is not None and there[:2] != there[1::-1]:
            exchanged = shapes[name] == there[1::-1]
            wrong += [] if exchanged or shapes[name] == there[:2] else [name]
        elif exchanged is None:
            exchanged = is_flipped(adapter.config) is True and not (there and there[2])
        if exchanged:
            (square if shapes[name][0] == shapes[name][1] else crossed).append(name)
    if wrong:
        verdict.refuse(
            f"the base's experts have other shapes: {names_in_brief(wrong)}",
            "use the base that the adapter was trained on",
        )
    if crossed:
        verdict.refuse(
            "A and B of experts are exchanged, as PEFT before 0.19 wrote them, and do not fit: "
            f"{names_in_brief(crossed)}",
            _CONVERT,
        )
    reason = "A and B are exchanged, as PEFT before 0.19 wrote them, which their shapes do not tell"
    _fault(verdict, square, reason, _CONVERT)


def _shape_in(base: BaseModel | None, name: str, parameter: str) -> tuple[int, int, bool] | None:
    """(out, in) of the base's experts, and whether their parameter is [E, in, out]."""
    module = _experts_module(base, plain_name(name))
    weight = None if module is None else module._parameters.get(parameter)
    if not isinstance(weight, Tensor) or weight.dim() != 3:
        return None
    rows, columns = weight.shape[1:]
    transposed = bool(getattr(module, "is_transposed", False))
    return (columns, rows, True) if transposed else (rows, columns, False)


def _fault(verdict: Verdict, names: list[str], reason: str, remedy: str) -> None:
    for name in names:
        found = verdict.layers.get(name)
        if isinstance(found, Applied):
            verdict.layers[name] = replace(found, fault=reason, remedy=remedy)
