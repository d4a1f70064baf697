"""`add_lora`, and functions that merge, unload, switch, read and load a model's adapters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.names import nearest, without_wrappers
from .._utils.progress import tracked
from ..init.sharded.agree import together
from ..init.sharded.layout import fill_, full_shape
from ..init.sharded.whole import whole
from ..init.sharded.zero3 import gathered
from ..layers.adapted import AdaptedLayer
from ..layers.base import base_of
from ..layers.state import LayerState
from ..layers.wrapper import LoRAWrapper
from .config import AdapterState, LoRAConfig, TokenRows
from .install.base_weights import settled_weights
from .install.blocks import RepeatedBlocks, separate_blocks
from .install.layers import (
    adapted_layers,
    check_mergeable,
    install,
    layers_with_names,
    merge_adapted,
    restore_adapted,
    untie_if_needed,
    unwrapped,
)
from .install.record import (
    ModelAdapters,
    activate_new,
    adapters_of,
    all_or_nothing,
    apply,
    check_absorbed,
    check_dtypes,
    check_model,
    check_name,
    check_started,
    check_weights,
    forget,
    known_name,
    needed_record,
    record_of,
    switch,
)
from .install.saved_modules import (
    extra_places,
    frozen_places,
    row_places,
    saved_places,
    trained_biases,
)
from .install.sharded.fsdp import leave, reshard, sync_trainable
from .install.sharded.fsdp1 import by_unit
from .originals import OriginalWeights
from .plan import LayerPlan, check_norms, plan_layers, plan_starts, plan_states
from .report import LoRAReport, make_report
from .selection import (
    select_layers,
    tie_adapters,
    tie_weights,
    tied_layers,
    with_saved_ties,
    with_task_head,
    with_ties,
)
from .starts import first_rank_loads, load_from_first_rank, naming
from .starts.ranks import redistributed


def add_lora(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    adapter_name: str = "default",
    gradients: Mapping[str, Tensor] | None = None,
    activations: Mapping[str, Any] | None = None,
    original_weights: Mapping[str, Tensor] | str | Path | None = None,
    progress: bool = True,
) -> LoRAReport:
    """Adapts a model in place: replaces the selected layers and freezes all other parameters.

    The model's outputs do not change except for rounding, unless a start changes the model on
    purpose. A second call with another `adapter_name` adds a further adapter to the same base and
    activates it. To attach several adapters to one base, set residual="implicit" for all of them,
    including the first.

    A module that reads `.weight` in its forward, without calling the layer, gets the weight with
    the adapter in it; code outside of a forward gets the stored weight. (A quantized layer always
    gives the stored weight.) If the source of the model's classes shows such a read, "all-linear"
    leaves the layer out, and naming the layer in `target_modules` raises ValueError.

    Args:
        model: any `nn.Module` that is not yet wrapped by DDP, FSDP or `torch.compile`.
        config: how to adapt the model; None means `LoRAConfig()`.
        adapter_name: the adapter's name for `set_adapter`, `save_adapter` and the like.
        gradients: {layer name: ∂loss/∂W [out, in]} from `capture_gradients`, for starts that are
            computed from gradients.
        activations: {layer name: statistics of the layer's inputs} from `capture_activations`, for
            starts that are computed from activations.
        original_weights: the weights of a quantized model before quantization, for LoftQ and QERA:
            a dict {name: W [out, in]}, or the path of a checkpoint, whose tensors are read one at a
            time.
        progress: whether to show a progress bar; this needs rich, and a terminal on standard error.

    Returns:
        A report of the adapted layers, and of the skipped layers with reasons. `print` shows it.

    Raises:
        ValueError: nothing to adapt, an unknown name, a rank that is too large, or a weight for
            which no start can be computed (the layer is named). The model is then unchanged.
        TypeError: an argument of the wrong type, or a target that cannot be adapted. The model is
            then unchanged.

    """
    began = time.perf_counter()
    config = LoRAConfig() if config is None else config
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    check_model(model)
    reshard(model)
    record = record_of(model) or ModelAdapters()
    check_name(adapter_name, record)
    check_absorbed(model, record)
    config = with_ties(model, with_task_head(model, config))
    selection = select_layers(model, config)
    config, selection = redistributed(config, selection, activations)
    saved = saved_places(model, config.modules_to_save)
    originals = None if original_weights is None else OriginalWeights(original_weights)
    one_loads = first_rank_loads(selection.layers.values())
    with together(where=one_loads):
        plans = plan_layers(model, selection, config, originals)
        check_weights(model, plans, record)
        places = {**saved, **trained_biases(model, config.bias, plans)}
        _refuse_saved_on_meta(plans, places)
        check_dtypes(model, plans, places)
    with all_or_nothing(model, record, adapter_name), torch.no_grad():
        plan_starts(plans, config.initializer, gradients, progress, activations)
        if one_loads:
            load_from_first_rank(places)
        record.saved.add(adapter_name, places, tied=config.ensure_weight_tying)
        install(model, record.saved, plans, plans, adapter_name)
        tie_adapters(model, config, adapter_name)
    activate_new(model, record, config, adapter_name)
    return make_report(model, adapter_name, plans, selection, places, time.perf_counter() - began)


def _refuse_saved_on_meta(plans: Sequence[LayerPlan], places: Collection[str]) -> None:
    """Raises ValueError if tensors that are trained in full would be loaded later: their originals
    are stored outside of the model, where no loader would find them.
    """
    if places and any(plan.waits for plan in plans):
        raise ValueError(
            f"{next(iter(places))} is to be trained in full (modules_to_save, bias), but the model "
            "is on the meta device: add the adapter once its weights are loaded"
        )


def merge_lora(
    model: nn.Module, adapter_name: str | None = None, *, dequantize: bool = False
) -> nn.Module:
    """Merges an adapter into the weights, in place, and removes all adapters.

    The layers become what they were before `add_lora`, with the weight W + s·(BA − B₀A₀), summed in
    float32 or wider and rounded once. A bias of B (PEFT's `lora_bias`) is added to the layer's
    bias; a layer without a bias gets one, with a warning. All parameters are frozen afterwards.

    Args:
        model: a model adapted by `add_lora` or `load_adapter`.
        adapter_name: the adapter to merge; the active one if None.
        dequantize: `merge_lora` raises an error for quantized layers, where rounding would erase
            the update. True turns these layers into a float32 `nn.Linear` instead.

    Returns:
        The model itself.

    Raises:
        ValueError: no adapter of that name, quantized layers without `dequantize=True`, or a
            sharded layer that cannot be merged in place. The model is then unchanged.

    """
    record = needed_record(model)
    name = known_name(record, adapter_name)
    check_started(model, name)
    wrapped = [
        path
        for path, layer in adapted_layers(model).items()
        if name in layer.adapter_names and isinstance(layer, LoRAWrapper)
    ]
    if wrapped and not dequantize:
        raise ValueError(
            f"{len(wrapped)} layers are quantized ({wrapped[0]} ...), and rounding would erase the "
            "update: load the base in floating point and load_adapter there, or pass "
            "dequantize=True to turn them into nn.Linear"
        )
    reshard(model)
    check_mergeable(model, name)
    set_adapter(model, name)
    record.saved.settle()
    adapted, tied = layers_with_names(model), tied_layers(model, name)
    adapters = [layer.adapters for _, layer in adapted]
    _warn_of_new_biases([layer for _, layer in adapted if name in layer.adapter_names])
    for whole_here, own in by_unit(model, adapted, lambda entry: entry[1], write=True):
        with whole_here:
            while own:  # frees each old W before the next layer is merged
                paths, layer = own.pop()
                finish = merge_adapted if name in layer.adapter_names else restore_adapted
                finish(model, paths, layer)
    model.requires_grad_(False)
    leave(model, adapters)
    tie_weights(model, tied)
    untie_if_needed(model)
    separate_blocks(model, record.replication)
    sync_trainable(model)
    forget(model, record)
    return model


def _warn_of_new_biases(layers: Sequence[AdaptedLayer]) -> None:
    new = [layer for layer in layers if layer.active().lora_bias is not None]
    new = [layer for layer in new if getattr(layer, "bias", None) is None]
    if new:
        warnings.warn(
            f"{len(new)} layers now have a bias from the adapter, which their model's class does "
            "not have: from_pretrained will drop it if you save this model; save the adapter "
            "instead",
            stacklevel=3,
        )


def unload_lora(model: nn.Module) -> nn.Module:
    """Removes all adapters in place and restores the base, whose parameters stay frozen.

    The weights are restored bit for bit, or to one rounding where s·B₀A₀ had been subtracted from
    them (residual="absorb").

    Returns:
        The model itself.

    Raises:
        ValueError: the model has no adapters, or s·B₀A₀ was subtracted from the weight of a
            convolution or attention that is sharded. The model is then unchanged.

    """
    record = needed_record(model)
    reshard(model)
    for path, layer in adapted_layers(model).items():
        with naming(path):
            layer.check_restorable()
    record.saved.activate(None)
    sync_trainable(model, mixed=True)
    adapted = layers_with_names(model)
    adapters = [layer.adapters for _, layer in adapted]
    for whole_here, own in by_unit(model, adapted, lambda entry: entry[1], write=True):
        with whole_here:
            for paths, layer in own:
                restore_adapted(model, paths, layer)
    leave(model, adapters)
    if record.blocks is not None:
        record.blocks.restore()
    forget(model, record)
    return model


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Activates an adapter: it is used in forward and is the one that trains. Layers without this
    adapter compute what the base computes.

    Raises:
        ValueError: no adapter of that name.

    """
    record = needed_record(model)
    name = known_name(record, adapter_name)
    check_started(model, name)
    switch(model, record, name)


class disable_adapters(AbstractContextManager["disable_adapters"]):  # noqa: N801  (used as a function)
    """The model computes what its base computes, until `enable_adapters`, `set_adapter` or the end
    of `with disable_adapters(model):`.

    Layers that absorbed their initial factors (residual="absorb") match the base to one rounding of
    their dtype and restore W in every forward; all other layers match it bit for bit.

    Raises:
        ValueError: the model has no adapters.

    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        record = needed_record(model)
        self._before = record.enabled
        apply(model, record, enabled=False)

    def __exit__(self, *error: object) -> None:
        record = record_of(self._model)
        if record is None:  # merged or unloaded within the block
            return
        apply(self._model, record, enabled=self._before)


def enable_adapters(model: nn.Module) -> None:
    """Switches the active adapter on again, after `disable_adapters`.

    Raises:
        ValueError: the model has no adapters.

    """
    record = needed_record(model)
    apply(model, record)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order in which they were added."""
    record = record_of(model)
    return [] if record is None else list(record.configs)


def adapter_state(
    model: nn.Module, adapter_name: str | None = None, *, keep: bool = True
) -> AdapterState:
    """A copy of an adapter on the CPU; the active adapter if `adapter_name` is None.

    If the model is sharded, all processes must call this function. Each gets the whole adapter, or
    tensors on the meta device if its `keep` is False.

    Raises:
        ValueError: no adapter of that name.

    """
    wrapped, model = model, unwrapped(model)
    record = needed_record(model)
    name = known_name(record, adapter_name)
    check_started(model, name)
    reshard(model)
    adapters = adapters_of(model, name)
    layers: dict[str, LayerState] = {}
    for whole_here, parts in by_unit(wrapped, list(adapters.items()), lambda entry: entry[1]):
        with whole_here:
            layers |= {path: adapter.layer_state(keep) for path, adapter in parts}
    layers = {path: layers[path] for path in adapters}  # in the model's order
    extra, rows, tokens = {}, {}, record.tokens.get(name, {})
    for path, tensor in _saved_tensors(wrapped, record, name, keep).items():
        indices = tokens.get(path, ())
        if indices:
            rows[path] = TokenRows(indices, tensor[list(indices)])
        elif indices is not None:
            extra[without_wrappers(path)] = tensor
    config = getattr(model, "config", None)
    base = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return AdapterState(record.configs[name], layers, extra, base or None, rows, record.replication)


def _saved_tensors(
    model: nn.Module, record: ModelAdapters, adapter_name: str, keep: bool
) -> dict[str, Tensor]:
    """Copies on the CPU of the tensors that an adapter trains in full, by name."""
    tensors = record.saved.tensors(adapter_name)
    found: dict[str, Tensor] = {}
    for whole_here, own in by_unit(model, list(tensors), record.saved.module):
        with whole_here:
            found |= {path: whole(tensors[path], keep) for path in own}
    return {path: found[path] for path in tensors}


def apply_state(
    model: nn.Module,
    state: AdapterState,
    *,
    adapter_name: str = "default",
    is_trainable: bool = True,
    progress: bool = True,
) -> LoRAReport:
    """Adds a saved adapter to its base.

    If s·B₀A₀ was absorbed, it is subtracted from the weights again. Layers whose weight cannot be
    rewritten, or that have other adapters, subtract it in every forward instead.

    Raises:
        ValueError: the model does not have a layer or tensor of the adapter, or has it in another
            shape. The model is then unchanged.

    """
    check_model(model)
    reshard(model)
    record = record_of(model) or ModelAdapters()
    check_name(adapter_name, record)
    check_absorbed(model, record)
    if record.configs:
        _check_replication(record, state)
    elif state.replication:
        record.blocks = RepeatedBlocks(model, state.replication)
    try:
        return _add_state(model, record, state, adapter_name, is_trainable, progress)
    except BaseException:
        if record.blocks is not None and not record.configs:
            record.blocks.restore()
        raise


def _check_replication(record: ModelAdapters, state: AdapterState) -> None:
    """Raises ValueError if the model's blocks are not repeated as an adapter needs."""
    if record.replication != state.replication:
        wanted, found = (list(map(list, r)) for r in (state.replication, record.replication))
        raise ValueError(
            f"the adapter has layer_replication = {wanted}, the model with its other adapters "
            f"{found}: they name other blocks; unload_lora first"
        )


def _add_state(
    model: nn.Module,
    record: ModelAdapters,
    state: AdapterState,
    adapter_name: str,
    is_trainable: bool,
    progress: bool,
) -> LoRAReport:
    """`apply_state` for a model whose blocks are repeated as the adapter needs."""
    began = time.perf_counter()
    state = settled_weights(model, state)
    config = with_saved_ties(model, state.config)
    one_loads = first_rank_loads(filter(None, map(base_of, model.modules())))
    with together(where=one_loads):
        plans, selection = plan_states(model, state)
        check_weights(model, plans, record)
        places = extra_places(model, state)
    frozen = frozen_places(model, places, config.modules_to_save)
    with_rows, rows = row_places(model, state)
    if is_trainable:
        check_dtypes(model, plans, {n: place for n, place in places.items() if n not in frozen})
    if rows and is_trainable:
        warnings.warn(
            f"the adapter's rows of {', '.join(state.rows)} are used as they are: training here "
            "does not change them",
            stacklevel=4,
        )
    with all_or_nothing(model, record, adapter_name), torch.no_grad():
        if one_loads:
            load_from_first_rank({**places, **with_rows})
        check_norms(plans)
        values = state.extra | {
            name: rows[name].put_(gathered(getattr(module, key)))
            for name, (module, key) in with_rows.items()
        }
        places |= with_rows
        ties = config.ensure_weight_tying
        record.saved.add(adapter_name, places, values, {*frozen, *rows}, ties)
        record.tokens[adapter_name] = _tokens(state, rows)
        install(model, record.saved, plans, tracked(plans, "loading", progress), adapter_name)
        tie_adapters(model, config, adapter_name, loaded=True)
    activate_new(model, record, config, adapter_name, is_trainable)
    return make_report(model, adapter_name, plans, selection, places, time.perf_counter() - began)


@torch.no_grad()
def replace_state(model: nn.Module, state: AdapterState, adapter_name: str) -> None:
    """Overwrites an adapter's tensors in place with those of a saved adapter.

    Raises:
        ValueError: no adapter of that name; or the saved adapter has other layers, ranks or tensors
            trained in full, or cannot be written in place. The model is then unchanged.

    """
    record = needed_record(model)
    name = known_name(record, adapter_name)
    check_started(model, name)
    _check_replication(record, state)
    reshard(model)
    state = settled_weights(model, state)
    adapters, extra = adapters_of(model, name), record.saved.tensors(name)
    extra = {without_wrappers(path): tensor for path, tensor in extra.items()}
    rows = _tied_like(record.tokens.get(name, {}), state)
    _check_same_names("layer", adapters, state.layers)
    _check_same_names("tensor trained in full", extra, {**state.extra, **rows})
    for path, layer in state.layers.items():
        with naming(path):
            adapters[path].check_replaceable(layer)
    for path, tensor in state.extra.items():
        if tuple(tensor.shape) != full_shape(extra[path]):
            old, new = list(full_shape(extra[path])), list(tensor.shape)
            raise ValueError(f"{path} has shape {old} in this model, {new} in the new adapter")
    for path, row in rows.items():
        row.check(path, full_shape(extra[path]))
    rule, dropout = state.config.scaling_rule, state.config.lora_dropout
    for path, layer in state.layers.items():
        adapter = adapters[path]
        adapter.replace_(layer, layer.options(rule, dropout, adapter.residual))
    for path, tensor in state.extra.items():
        fill_(extra[path], tensor)
    for path, row in rows.items():
        fill_(extra[path], row.put_(whole(record.saved.original(path))))
    record.tokens[name] = _tokens(state, rows)
    record.configs[name] = state.config


def _tokens(
    state: AdapterState, rows: Mapping[str, TokenRows]
) -> dict[str, tuple[int, ...] | None]:
    """`ModelAdapters.tokens` of an adapter; `rows` includes the rows of tied weights."""
    return {name: row.indices if name in state.rows else None for name, row in rows.items()}


def _tied_like(
    tokens: Mapping[str, tuple[int, ...] | None], state: AdapterState
) -> dict[str, TokenRows]:
    """The rows of a saved adapter, and of the weights that are tied to its first weight."""
    tied = [name for name, indices in tokens.items() if indices is None and name not in state.rows]
    first = next((state.rows[n] for n, i in tokens.items() if i and n in state.rows), None)
    return {**state.rows, **({} if first is None else dict.fromkeys(tied, first))}


def _check_same_names(what: str, old: Collection[str], new: Collection[str]) -> None:
    """Raises ValueError for a name that only one of two adapters has."""
    for name in (*new, *old):
        if name not in old:
            raise ValueError(
                f"the new adapter has a {what} {name!r}, this one does not{nearest(name, old)}"
            )
        if name not in new:
            raise ValueError(
                f"this adapter has a {what} {name!r}, the new one does not{nearest(name, new)}"
            )
