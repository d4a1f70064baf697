"""`add_weighted_adapter`: a new adapter that is a weighted combination of others, as in PEFT."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from ...._utils.checks import as_integer
from ...._utils.errors import unknown_name
from ....layers.state import LayerState
from ...config import AdapterState, LoRAConfig
from ...lora import adapter_state, apply_state
from ...report import LoRAReport
from ..record import (
    adapters_of,
    apply,
    check_name,
    known_name,
    needed_record,
    switch,
)
from .combinations import combination, combined_layer

COMBINATIONS = ("svd", "linear", "cat")
# PEFT's other combinations, which prune or drop elements of the factors.
_PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_NOT_HERE = (*_PRUNING, *(f"{name}_svd" for name in _PRUNING))
T = TypeVar("T")


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> LoRAReport:
    """Adds an adapter that combines the updates sᵢ·BᵢAᵢ of other adapters with the weights wᵢ. The
    new adapter has no start and s = 1, is not trainable, and does not become active.

    The combinations and their ranks are those of `LoraModel.add_weighted_adapter` of PEFT 0.21:

    - "svd": the best approximation of Σ wᵢsᵢ·BᵢAᵢ of rank `svd_rank`, by default the largest rank
      of the adapters. The SVD is that of thin factors in float64; no [out, in] matrix is formed.
    - "cat": A = [wᵢsᵢ·Aᵢ], B = [Bᵢ]: the exact sum, whose rank is the sum of the ranks.
    - "linear": A = Σ ±√|wᵢsᵢ|·Aᵢ, B = Σ √|wᵢsᵢ|·Bᵢ, where ± is the sign of wᵢ, for adapters of one
      rank. BA then also contains products of different adapters' A and B. A single adapter is
      always scaled in this way, whatever the type.

    An R, or KaSA's λ, is multiplied into A. An adapter with a start has the update
    sᵢ·(BᵢAᵢ − B₀A₀), of twice the rank. A layer that only some adapters have combines only these.

    PEFT's result differs in these cases. If the first adapter has `use_rslora`, PEFT multiplies
    everything by √r. PEFT leaves out biases of B, layers that the first adapter's `exclude_modules`
    or `layers_to_transform` does not select, and the values of saved modules. If an adapter of the
    new name exists, PEFT does nothing.

    Args:
        model: a model with adapters by `add_lora` or `load_adapter`.
        adapters: the names of the adapters.
        weights: a number for each adapter; it may be negative.
        adapter_name: the name of the new adapter.
        combination_type: "svd", "cat" or "linear".
        svd_rank: the rank for "svd".

    Returns:
        A report of the new adapter's layers.

    Raises:
        ValueError: an unknown adapter or combination, a name that is taken, different numbers of
            weights and adapters, different ranks or a start with "linear", an adapter with DoRA, or
            a tensor that several of the adapters train in full (`modules_to_save`, biases). The
            model is then unchanged.
        TypeError: an argument of the wrong type.

    """
    record = needed_record(model)
    _check_names(adapters)
    names = [known_name(record, name) for name in adapters]
    check_name(adapter_name, record)
    numbers = _checked_weights(names, weights)
    _check_type(combination_type, svd_rank)
    states = [adapter_state(model, name) for name in names]
    kind = "linear" if len(names) == 1 else combination_type
    r = _new_rank(kind, names, states, svd_rank)
    combined = combination(kind, r)
    layers = {
        path: combined_layer(path, parts, r, combined)
        for path, parts in _by_layer(names, numbers, states).items()
    }
    new = AdapterState(
        _config(states, layers, r),
        layers,
        _only_once(names, [state.extra for state in states]),
        states[0].base_model,
        _only_once(names, [state.rows for state in states]),
        record.replication,
    )
    return _add_inactive(model, new, adapter_name)


def _check_names(adapters: Sequence[str]) -> None:
    if isinstance(adapters, str) or not isinstance(adapters, Sequence):
        raise TypeError(f"adapters must be a list of names, got {adapters!r}")
    if not adapters:
        raise ValueError("adapters is empty: give the names of the adapters to combine")
    for name in adapters:
        if not isinstance(name, str):
            raise TypeError(f"adapters must be a list of names, got {name!r} in it")


def _checked_weights(names: Sequence[str], weights: Sequence[float]) -> list[float]:
    """The weights as floats, one for each adapter."""
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise TypeError(f"weights must be a list of numbers, got {weights!r}") from None
    if len(numbers) != len(names):
        raise ValueError(f"there are {len(names)} adapters and {len(numbers)} weights")
    for name, number in zip(names, numbers, strict=True):
        if not math.isfinite(number):
            raise ValueError(f"the weight of adapter {name!r} is {number}: it must be finite")
    return numbers


def _check_type(combination_type: str, svd_rank: int | None) -> None:
    if combination_type in _NOT_HERE:
        raise ValueError(
            f"combination_type={combination_type!r} is not implemented here: use 'svd', 'cat' or "
            "'linear', or combine the adapters with PEFT"
        )
    if combination_type not in COMBINATIONS:
        raise unknown_name("combination_type", combination_type, COMBINATIONS)
    if svd_rank is not None:
        as_integer(svd_rank, "svd_rank", minimum=1)


def _new_rank(
    kind: str, names: Sequence[str], states: Sequence[AdapterState], svd_rank: int | None
) -> int:
    """The rank of all layers of the new adapter."""
    ranks = [_rank(state) for state in states]
    if kind == "cat":
        return sum(ranks)
    if kind == "svd":
        return svd_rank or max(ranks)
    if len(set(ranks)) > 1:
        listed = ", ".join(f"{n!r} {r}" for n, r in zip(names, ranks, strict=True))
        raise ValueError(
            f"combination_type='linear' adds adapters of one rank, these have {listed}: use 'cat' "
            "or 'svd'"
        )
    started = [name for name, state in zip(names, states, strict=True) if _has_start(state)]
    if started and len(names) > 1:
        raise ValueError(
            f"adapter {started[0]!r} subtracts a start, and combination_type='linear' would add "
            "its initial factors to the factors of others: use 'cat' or 'svd'"
        )
    return ranks[0]


def _rank(state: AdapterState) -> int:
    """The largest rank that the configuration gives, as in PEFT, or that a fused layer has; twice
    that with a start.
    """
    fused = [layer.r for layer in state.layers.values() if layer.parts]
    rank = max(state.config.r, *state.config.rank_pattern.values(), *fused, 0)
    return 2 * rank if _has_start(state) else rank


def _has_start(state: AdapterState) -> bool:
    return any(layer.changes_base for layer in state.layers.values())


def _by_layer(
    names: Sequence[str], weights: Sequence[float], states: Sequence[AdapterState]
) -> dict[str, list[tuple[float, LayerState]]]:
    """The adapters' states of each layer, with their weights, in the order of the adapters."""
    found: dict[str, list[tuple[float, LayerState]]] = {}
    for name, weight, state in zip(names, weights, states, strict=True):
        for path, layer in state.layers.items():
            if layer.lora_magnitude is not None:
                raise ValueError(
                    f"adapter {name!r} has DoRA's magnitudes, which cannot be combined: merge_lora "
                    "it into the model, or combine other adapters"
                )
            found.setdefault(path, []).append((weight, layer))
    return found


def _only_once(names: Sequence[str], found: Sequence[dict[str, T]]) -> dict[str, T]:
    """The tensors that adapters train in full; no two adapters may train the same tensor."""
    owners: dict[str, str] = {}
    for name, tensors in zip(names, found, strict=True):
        for path in tensors:
            other = owners.setdefault(path, name)
            if other != name or names.count(name) > 1:
                raise ValueError(
                    f"adapters {other!r} and {name!r} both train {path} in full (modules_to_save, "
                    "bias), which cannot be combined"
                )
    return {path: tensor for tensors in found for path, tensor in tensors.items()}


def _config(states: Sequence[AdapterState], layers: dict[str, LayerState], r: int) -> LoRAConfig:
    """A configuration of the layers of all adapters, with rank r and s = 1."""
    first = states[0].config
    saved = [n for state in states for n in state.config.modules_to_save or ()]
    biases = [state.config.bias for state in states if state.config.bias != "none"]
    stacks = [path for path, layer in layers.items() if layer.experts is not None]
    return LoRAConfig(
        r=r,
        lora_alpha=float(r),
        target_modules=[path for path in layers if path not in stacks] or None,
        target_parameters=stacks or None,
        modules_to_save=list(dict.fromkeys(saved)) or None,
        bias=biases[0] if biases else "none",
        lora_dropout=first.lora_dropout,
        task_type=first.task_type,
        init_lora_weights="lora",
        residual="implicit",
        ensure_weight_tying=any(state.config.ensure_weight_tying for state in states),
    )


def _add_inactive(model: nn.Module, state: AdapterState, adapter_name: str) -> LoRAReport:
    """Adds a saved adapter; the active adapter stays active, and as trainable as it was."""
    record = needed_record(model)
    before, enabled = record.active, record.enabled
    trained: list[Tensor] = list(record.saved.tensors(before).values())
    trained += [p for adapter in adapters_of(model, before).values() for p in adapter.parameters()]
    trains = any(tensor.requires_grad for tensor in trained)
    try:
        return apply_state(
            model, state, adapter_name=adapter_name, is_trainable=False, progress=False
        )
    finally:
        switch(model, record, before, trains)
        apply(model, record, enabled=enabled)
