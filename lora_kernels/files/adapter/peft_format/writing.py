"""Writes an `AdapterState` in PEFT's adapter format: `adapter_config.json` and tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ...._utils.names import match_names
from ...._utils.peft_names import (
    BIAS_OF_B,
    DORA,
    PREFIX,
    REPLICATION,
    TARGET_PARAMETERS,
    TASK_HEADS,
    TIE,
    TOKEN_INDICES,
    factor_key,
)
from ....layers.state import LayerState
from ....model.config import AdapterState
from ..portable import padded
from .experts.layouts import STACKED, Pair, to_pairs
from .experts.writing import (
    Parts,
    file_parts,
    layout_of,
    missing_projections,
    target_modules,
    target_parameters,
)
from .magnitudes import in_shape, magnitude_key
from .reading import saved_module
from .shapes import attention_of, file_rank, name_in_file, to_file
from .tokens import rows_to_peft

MICA = "mica"  # PEFT's `init_lora_weights` for adapters whose B it freezes


def to_peft(
    state: AdapterState,
    module_names: Collection[str] | None = None,
    fan_in_fan_out: bool = False,
    *,
    portable: bool = True,
    layout: str = STACKED,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration, and the tensors in float32 or wider.

    Args:
        state: the adapter.
        module_names: the names of all modules of the base. They allow `target_modules` to have
            endings that PEFT resolves to exactly these layers; without them it has full names.
        fan_in_fan_out: whether the layers are Conv1D. PEFT corrects a wrong value, with a warning.
        portable: whether B is multiplied by s and all layers get one rank (see
            `lora_kernels.files.adapter.portable`). Otherwise the configuration has each layer's s
            and rank, so that PEFT can train the adapter; experts are stacked then.
        layout: the layout of experts that `chosen_layout` returns.

    """
    config = state.config
    pairs = {
        name: layer.portable_factors() if portable else layer.update_factors()
        for name, layer in state.layers.items()
    }
    ranks = {name: right.shape[-2] for name, (right, _) in pairs.items()}
    # Convolutions with groups have a larger rank in the file, given by a pattern for each of them.
    grouped = {n: file_rank(state.layers[n], r) for n, r in ranks.items() if _is_grouped(state, n)}
    largest = max([r for n, r in ranks.items() if n not in grouped] or grouped.values())
    parts = file_parts(state, layout if portable else STACKED, None if portable else {})
    if portable:
        pairs = {
            n: (A, B) if n in grouped else (padded(A, largest, -2), padded(B, largest, -1))
            for n, (A, B) in pairs.items()
        }
        pairs |= {n: pair for n, pair in _zeros(state, largest).items() if n in parts}
    tensors = _tensors(state, pairs, parts)
    saved: dict[str, None] = {}  # the saved modules, in the order of their tensors
    for key, tensor in state.extra.items():
        owner, _, last = key.rpartition(".")
        module = saved_module(owner, config.modules_to_save or (), last != "bias")
        if module is not None:
            saved[module] = None
        elif last.endswith(("bias", "weight")) and owner in state.layers:
            key = f"{name_in_file(owner, state.layers)}.base_layer.{last}"
        tensors[PREFIX + key] = tensor
    biases = _biases(state, portable)
    tensors |= biases
    magnitudes = {
        magnitude_key(name_in_file(name, state.layers)): in_shape(m, layer.kernel)
        for name, layer in state.layers.items()
        if (m := layer.lora_magnitude) is not None
    }
    tensors |= magnitudes
    indices, rows = rows_to_peft(state.rows)
    tensors |= rows
    linear = [n for n in state.layers if n not in parts and not attention_of(n, state.layers)]
    if state.replication and not set(linear) <= set(module_names or ()):
        module_names = None  # these are the base's, without its repeated blocks
    targets, excluded = exact_targets(linear, module_names, tuple(saved)) if linear else ([], None)
    parameters: dict[str, Any] = {}
    if parts and layout_of(parts) == STACKED:
        known = None if module_names is None else [*state.experts, *parts]
        parameters = {TARGET_PARAMETERS: target_parameters(list(parts), known)}
    elif parts:
        targets = [*targets, *(t for t in target_modules(parts) if t not in targets)]
    scalings = {n: s.scaling for n, s in state.layers.items() if n in parts or n in linear}
    return {
        "peft_type": "LORA",
        "task_type": _task_type(config.task_type, saved),
        "base_model_name_or_path": state.base_model,
        "inference_mode": True,
        **(
            portable_fields(largest, grouped)
            if portable
            else rank_fields(scalings, {n: (ranks | grouped)[n] for n in scalings})
        ),
        **({"init_lora_weights": MICA} if not portable and _is_mica(state) else {}),
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(saved) or None,
        "bias": config.bias,
        # PEFT cannot load an adapter of experts with dropout.
        "lora_dropout": 0.0 if parts and portable else config.lora_dropout,
        "fan_in_fan_out": fan_in_fan_out,
        **parameters,
        **({TOKEN_INDICES: indices} if indices else {}),
        **({BIAS_OF_B: True} if biases else {}),
        **({DORA: True} if magnitudes else {}),
        **({TIE: True} if config.ensure_weight_tying else {}),
        **({REPLICATION: list(map(list, state.replication))} if state.replication else {}),
    }, tensors


def _is_mica(state: AdapterState) -> bool:
    """Whether PEFT has to be told to freeze B of every layer. PEFT then computes the start anew
    before it loads this one, which it cannot do for float64 weights, convolutions and experts.
    """

    def can(layer: LayerState) -> bool:
        plain = not layer.kernel and layer.experts is None
        return plain and layer.lora_A.dtype != torch.float64

    return all(layer.trains == "A" and can(layer) for layer in state.layers.values())


def _tensors(state: AdapterState, pairs: Mapping[str, Pair], parts: Parts) -> dict[str, Tensor]:
    """A and B of all layers by PEFT's names; experts have several tensors."""
    tensors: dict[str, Tensor] = {}
    for name, (right, left) in pairs.items():
        embedding = name in state.layers and state.layers[name].embedding
        own = to_pairs(right, left, parts[name]) if name in parts else {}
        if name not in parts:
            place = name_in_file(name, state.layers)
            own[place] = to_file(state.layers[name], (right, left), place != name)
        for place, (A, B) in own.items():
            tensors[factor_key(place, "A", embedding=embedding)] = A
            tensors[factor_key(place, "B", embedding=embedding)] = B
    return tensors


def _zeros(state: AdapterState, r: int) -> dict[str, Pair]:
    """Zeros for A [E, r, in] and B [E, out, r] of the `missing_projections`."""
    return {
        name: (torch.zeros(experts, r, columns), torch.zeros(experts, out, r))
        for name, (experts, out, columns) in missing_projections(state).items()
    }


def _biases(state: AdapterState, portable: bool) -> dict[str, Tensor]:
    """The biases of all B by PEFT's names; zeros for layers without one if others have one."""
    if all(layer.lora_bias is None for layer in state.layers.values()):
        return {}
    biases = {}
    for name, layer in state.layers.items():
        if layer.experts is not None:  # PEFT's layers of parameters have no bias
            continue
        bias = layer.portable_bias() if portable else layer.lora_bias
        bias = layer.lora_B.new_zeros(len(layer.lora_B)) if bias is None else bias
        biases[f"{PREFIX}{name_in_file(name, state.layers)}.lora_B.bias"] = bias
    return biases


def _is_grouped(state: AdapterState, name: str) -> bool:
    """Whether a layer is a convolution with groups."""
    return state.layers[name].groups > 1


def portable_fields(r: int, others: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The fields of an adapter with s multiplied into B, whose layers all have rank r, except those
    with another rank in `others`.
    """
    patterns = {_pattern(name): own for name, own in (others or {}).items() if own != r}
    return {
        "r": r,
        "lora_alpha": r,
        "use_rslora": False,
        "rank_pattern": patterns,
        "alpha_pattern": dict(patterns),
        "init_lora_weights": True,
    }


def rank_fields(
    scalings: Mapping[str, float], ranks: Mapping[str, int], rslora: bool = False
) -> dict[str, Any]:
    """The fields that give each layer its rank and its s."""
    alphas = {name: _alpha(scalings[name], r, rslora) for name, r in ranks.items()}
    # The most common pair, because vLLM computes all layers' s from these two and ignores patterns.
    pairs = [(ranks[name], alphas[name]) for name in ranks]
    r, lora_alpha = Counter(pairs).most_common(1)[0][0]
    return {
        "r": r,
        "lora_alpha": lora_alpha,
        "use_rslora": rslora,
        "rank_pattern": {_pattern(n): k for n, k in ranks.items() if k != r},
        "alpha_pattern": {_pattern(n): a for n, a in alphas.items() if a != lora_alpha},
        "init_lora_weights": True,
    }


def _task_type(task_type: str | None, saved: Collection[str]) -> str | None:
    """None if PEFT would look for a head that is not among the saved modules."""
    heads = TASK_HEADS.get(task_type or "", ())
    return task_type if not heads or any(name.endswith(heads) for name in saved) else None


def _alpha(scaling: float, r: int, rslora: bool) -> float:
    """The lora_alpha for which α / r, or α / √r, equals `scaling`; an integer if possible."""
    divisor = math.sqrt(r) if rslora else r
    whole = round(scaling * divisor)
    return whole if whole / divisor == scaling else scaling * divisor


def _pattern(name: str) -> str:
    """A pattern for a whole name; PEFT's patterns are regular expressions for the end of a name."""
    return "^" + re.escape(name)


def exact_targets(
    names: Collection[str], module_names: Collection[str] | None, saved: tuple[str, ...] = ()
) -> tuple[list[str], str | None]:
    """`target_modules`: the shortest endings that match exactly these layers, or the full names.
    And `exclude_modules`: other modules that even the full names would match, by their full names.

    The last parts of the names are tried first, because serving engines know modules by these. The
    engines take a regular expression for a name or refuse it, so that only `exclude_modules` may
    be one.
    """
    if module_names is None:
        return sorted(names), None
    wanted = set(names)
    # PEFT adapts nothing inside saved modules.
    others = [n for n in module_names if saved_module(n, saved) is None]
    for length in (1, 2, None):
        endings = sorted(
            {name if length is None else ".".join(name.split(".")[-length:]) for name in names}
        )
        found = set(match_names(others, endings, others))
        if found == wanted:
            return endings, None
    return endings, "|".join(re.escape(name) for name in sorted(found - wanted))
