"""Reads PEFT's stacked adapters of experts: which parameter a name means, and in which of several
layouts of the same shapes the numbers are.

PEFT before 0.19 took [E, out, in] for [E, in, out]: A and B are exchanged, except where the
parameter really is [E, in, out]. Unsloth before September 2026 ordered the columns of B in another
way, which the shapes do not show. For a while Unsloth wrote `lora_B_layout` into the configuration;
otherwise only the user knows.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ....._utils.errors import unknown_name
from ....._utils.peft_names import TARGET_PARAMETERS
from .....model.config import StoredExperts
from .layouts import STACKED, Pair, unstacked
from .writing import DOWN, FIRST

ORDERS = ("auto", "fastest", "slowest")
MARKER = "lora_B_layout"
_MARKED = {"rank_major": "fastest", "grouped_by_expert": "slowest"}
_FLIPPED = (0, 19)  # the first version of PEFT whose A and B are those of [E, out, in]
_WRAPPER = ".base_layer"


def wrapped_parameters(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """{name of PEFT's wrapper: the parameter that the wrapper adapts}. `names` are the layers in a
    file; layers that are no such wrappers are left out.

    PEFT wraps a module once for each adapted parameter, in the order of the parameters in the
    module: "experts" adapts the last one, "experts.base_layer" the one before. Without
    `target_parameters`, "experts.base_layer" means gate_up_proj and "experts" means down_proj, as
    in vLLM.

    Raises:
        ValueError: the option is not a list of names.

    """
    targets = options.get(TARGET_PARAMETERS) or ()
    if isinstance(targets, str) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{TARGET_PARAMETERS} = {targets!r} is not a list of names")
    names = set(names)
    found = {}
    for name in names:
        module = name
        while module.endswith(_WRAPPER):
            module = module.removesuffix(_WRAPPER)
        depth = (len(name) - len(module)) // len(_WRAPPER)
        own = targeted_parameters(module, targets)
        if not own and {module, module + _WRAPPER} <= names and _is_experts(module):
            own = [next(iter(FIRST)), DOWN]
        if depth < len(own):
            found[name] = f"{module}.{own[len(own) - 1 - depth]}"
    return found


def targeted_parameters(module: str, targets: Iterable[str]) -> list[str]:
    """The adapted parameters of a module, in their order in the module."""
    own = set()
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        if f".{module}".endswith(f".{owner}") if owner else _is_experts(module):
            own.add(parameter)
    return sorted(own, key=lambda parameter: (parameter == DOWN, parameter))


def _is_experts(module: str) -> bool:
    return module.rpartition(".")[2] == "experts"


def column_order(options: Mapping[str, Any], order: str) -> str:
    """How the expert varies in the columns of B: "fastest" or "slowest".

    Raises:
        ValueError: the order is unknown, or the configuration contradicts it.

    """
    if order not in ORDERS:
        raise unknown_name("expert_order", order, ORDERS)
    marker = options.get(MARKER)
    if marker is not None and marker not in _MARKED:
        raise unknown_name(MARKER, str(marker), list(_MARKED))
    if marker is not None and order not in ("auto", _MARKED[marker]):
        raise ValueError(
            f"expert_order={order!r}, but the adapter's configuration says {MARKER} = {marker!r}"
        )
    if order != "auto":
        return order
    if marker is None and is_by_unsloth(options):
        warnings.warn(
            "the adapter of experts was written by Unsloth, which before September 2026 had the "
            "columns of lora_B in another order than PEFT; if this one is older, load it with "
            "expert_order='slowest'",
            stacklevel=2,
        )
    return "fastest" if marker is None else _MARKED[marker]


def is_by_unsloth(options: Mapping[str, Any]) -> bool:
    """Whether Unsloth wrote the configuration."""
    mapping = options.get("auto_mapping")
    return isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))


def is_flipped(options: Mapping[str, Any]) -> bool | None:
    """Whether the version of PEFT that wrote the file exchanged A and B; None if unknown."""
    version = str(options.get("peft_version") or "")
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return None
    number = (int(found[1]), int(found[2]))
    if "dev" in version and number == (_FLIPPED[0], _FLIPPED[1] - 1):
        return None  # a development version between 0.18 and 0.19
    return number < _FLIPPED


def exchanged(right: Tensor, left: Tensor) -> Pair:
    """A [E, r, in] and B [E, out, r] from the A and B of [E, in, out]."""
    return left.mT.contiguous(), right.mT.contiguous()


def unstacked_experts(
    options: Mapping[str, Any],
    pairs: Mapping[str, Pair],
    ranks: Mapping[str, int],
    order: str = "auto",
) -> tuple[dict[str, Pair], dict[str, StoredExperts]]:
    """A [E, r, in] and B [E, out, r] of experts' parameters, and what is uncertain about them. The
    parameters in `empty_stacks` are left out.

    Args:
        options: the content of `adapter_config.json`.
        pairs: PEFT's A [E·r, in] and B [out, r·E], by the names of the parameters.
        ranks: r of each parameter.
        order: see `column_order`.

    Raises:
        ValueError: the shapes do not fit each other, or the parameters are transposed and PEFT does
            not know it.

    """
    slowest = column_order(options, order) == "slowest" if pairs else False
    factors = {}
    for name, (lora_A, lora_B) in pairs.items():
        if len(lora_A) % ranks[name]:
            raise ValueError(
                f"lora_A of the experts {name!r} has {len(lora_A)} rows, no multiple of r = "
                f"{ranks[name]}: the configuration belongs to another adapter"
            )
        factors[name] = unstacked(lora_A, lora_B, len(lora_A) // ranks[name], slowest)
    flipped = is_flipped(options)
    known = {name: StoredExperts((), STACKED, flipped) for name in factors}
    shapes = {name: (left.shape[1], right.shape[2]) for name, (right, left) in factors.items()}
    for name, crossed in certain_exchanges(shapes, flipped).items():
        factors[name] = exchanged(*factors[name]) if crossed else factors[name]
        known[name] = StoredExperts((), STACKED)
    left_out = empty_stacks(factors)
    return {name: pair for name, pair in factors.items() if name not in left_out}, known


def empty_stacks(factors: Mapping[str, Pair]) -> set[str]:
    """The parameters whose A and B are all zeros, unless all parameters are like that. `to_peft`
    writes zeros for parameters that are not adapted, and training does not change such zeros.
    """
    empty = {name for name, (A, B) in factors.items() if not bool(A.any()) and not bool(B.any())}
    return empty if len(empty) < len(factors) else set()


def certain_exchanges(
    shapes: Mapping[str, tuple[int, int]], flipped: bool | None
) -> dict[str, bool]:
    """Whether A and B are exchanged, for the modules whose two parameters show it: the outputs of
    one parameter are the inputs of the other.

    Args:
        shapes: (out, in) of the parameters, assuming that A and B are not exchanged.
        flipped: see `is_flipped`.

    Raises:
        ValueError: the shapes do not fit each other, or the parameters are transposed and PEFT does
            not know it.

    """
    found: dict[str, bool] = {}
    for name, first in shapes.items():
        module, _, parameter = name.rpartition(".")
        down = f"{module}.{DOWN}"
        if parameter not in FIRST or down not in shapes:
            continue
        second = shapes[down]
        straight = _fit(first, second, FIRST[parameter])
        crossed = _fit(first[::-1], second[::-1], FIRST[parameter])
        if not straight and not crossed:
            raise ValueError(
                f"the shapes of {name!r}, {list(first)}, and of {DOWN!r}, {list(second)} ([out, "
                "in]), do not fit each other in any layout of PEFT"
            )
        if crossed and not straight and flipped is False:
            raise ValueError(
                f"the experts {name!r} are stored as [in, out], which PEFT does not know of this "
                "model (llama4's are so): they cannot be adapted here; load it with PEFT"
            )
        if straight != crossed:
            found |= {name: crossed, down: crossed}
    return found


def _fit(first: tuple[int, int], down: tuple[int, int], parts: int) -> bool:
    """Whether `first` and `down` are (out, in) of the two parameters."""
    return first[1] == down[0] and first[0] == parts * down[1]
