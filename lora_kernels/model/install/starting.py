"""`start_adapters`: starts adapters that were added while the weights were on the meta device."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..._utils.names import without_wrappers
from ...init.sharded.agree import from_every, has_ranks, together
from ...init.sharded.layout import is_sharded
from ..plan import LayerPlan, check_still_absorbing, plan_starts
from ..report import LoRAReport, make_report
from ..selection import Selection, select_layers
from ..starts import WAITS, WaitingAdapter, naming
from .layers import adapted_layers, unwrapped
from .record import ModelAdapters, known_name, needed_record, waiting_layers, waiting_names
from .sharded.fsdp import reshard, sync_trainable


def start_adapters(
    model: nn.Module,
    *,
    adapter_name: str | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    progress: bool = True,
) -> LoRAReport:
    """Computes the start of an adapter that `add_lora` added while the model was on the meta
    device.

    Call this once the weights are loaded, sharded or not. A, B and R are written in place, and
    s·B₀A₀ is subtracted; the results are bit for bit those of a model that had its weights when it
    was adapted. If the model is sharded, all processes must call this function. An adapter that was
    loaded from a checkpoint, with `load_state_dict` or `torch.distributed.checkpoint`, already has
    its start.

    Args:
        model: the adapted model.
        adapter_name: the adapter to start; None means the adapter that waits.
        gradients: {layer name: ∂loss/∂W [out, in]} from `capture_gradients`, for starts that are
            computed from gradients.
        progress: whether to show a progress bar; this needs rich, and a terminal on standard error.

    Returns:
        A report of the layers that got their start.

    Raises:
        ValueError: no adapter waits, a weight is still on the meta device, or no start can be
            computed for a weight (the layer is named). The adapter then still waits, and the
            weights are unchanged.

    """
    began = time.perf_counter()
    record = needed_record(model)
    reshard(model)
    name = _waiting_name(model, record, adapter_name)
    model, config = unwrapped(model), record.configs[name]
    selection = select_layers(model, config)
    adapters = waiting_layers(model, name)
    plans = [_plan(record, name, selection, path, adapters[path]) for path in adapters]
    check_still_absorbing(model, plans)
    with torch.no_grad():
        plan_starts(plans, config.initializer, gradients, progress)
        _start(plans, list(adapters.values()))
    sync_trainable(model)
    for layer in adapted_layers(model).values():
        if name in layer.adapter_names:
            layer.freeze()
    saved = record.saved.tensors(name)
    return make_report(model, name, plans, selection, saved, time.perf_counter() - began)


def _waiting_name(model: nn.Module, record: ModelAdapters, adapter_name: str | None) -> str:
    """The name of the adapter to start; raises ValueError if there is none, on all processes."""
    waiting = waiting_names(model, record)
    if has_ranks() and any(map(is_sharded, model.parameters())):
        found = from_every(waiting)
        if any(names != found[0] for names in found):
            which = [rank for rank, names in enumerate(found) if names]
            raise ValueError(
                f"an adapter waits for its start on ranks {which} of {len(found)} only: let all "
                "processes add it on the meta device, or all with the weights"
            )
    if adapter_name is not None and known_name(record, adapter_name) not in waiting:
        raise ValueError(f"adapter {adapter_name!r} has its start already")
    if not waiting:
        raise ValueError(
            "no adapter of this model waits for its start: add_lora computes it at once, unless "
            "the model is on the meta device"
        )
    if adapter_name is None and len(waiting) > 1:
        raise ValueError(f"several adapters wait for their start, {waiting}: give adapter_name")
    return adapter_name or waiting[0]


def _plan(
    record: ModelAdapters,
    adapter_name: str,
    selection: Selection,
    path: str,
    adapter: WaitingAdapter,
) -> LayerPlan:
    """The plan of a layer that waits; raises ValueError if its weight is not loaded."""
    names = {without_wrappers(name): name for name in selection.layers}
    name = names[path]
    base = selection.layers[name]
    if base.local.is_meta:
        raise ValueError(
            f"{base.parameter_name(name)} is on the meta device: adapter {adapter_name!r} {WAITS}"
        )
    initializer = record.configs[adapter_name].initializer
    plan = LayerPlan(name, base, adapter.options, selection.aliases[name])
    plan.changes_base, plan.initializer = adapter.changes_base, initializer
    return plan


def _start(plans: Sequence[LayerPlan], adapters: Sequence[WaitingAdapter]) -> None:
    """Writes the computed starts. If that fails, for example out of memory, the adapters wait
    again, and weights from which s·B₀A₀ was subtracted are restored to one rounding.
    """
    begun: list[tuple[LayerPlan, WaitingAdapter]] = []
    try:
        with together(where=any(plan.base.sharded for plan in plans)):
            for plan, adapter in zip(plans, adapters, strict=True):
                with naming(plan.name):
                    adapter.check_start(plan.computed_start())
            for plan, adapter in zip(plans, adapters, strict=True):
                begun.append((plan, adapter))
                adapter.start_(plan.computed_start(), plan.base.device)
                plan.subtract_()
    except BaseException:
        for plan, adapter in begun:
            if plan.subtracted:
                adapter.add_absorbed_(plan.base.shards())
            WaitingAdapter.wait_again(adapter)
        raise
