"""Puts planned layers into a model, and takes them out again if that cannot be finished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from .adapted import AdaptedLayer
from .plan import FLOAT_KINDS, LayerPlan
from .trained import TrainedTensors


def install(
    model: nn.Module,
    trained: TrainedTensors,
    plans: Sequence[LayerPlan],
    tracked_plans: Iterable[LayerPlan],
    adapter_name: str,
) -> None:
    """Does what was planned. It can fail for want of memory only, or be interrupted: what was done
    is undone then, to one rounding where a start had been absorbed (LoftQ's base stays quantised).
    """
    layers: list[AdaptedLayer] = []
    try:
        for plan in tracked_plans:
            layers.append(plan.built(adapter_name))
            plan.take_out_()
            plan.start = plan.trained = None
            _put(model, trained, plan, plan.module, layers[-1])
    except BaseException:
        for plan, layer in zip(plans, layers, strict=False):
            plan.undo_(layer, adapter_name)
            _put(model, trained, plan, layer, plan.module)
        raise
    for layer in layers:
        layer._freeze()


def _put(
    model: nn.Module, trained: TrainedTensors, plan: LayerPlan, old: nn.Module, new: nn.Module
) -> None:
    """Puts a layer into the place of another, under all its names."""
    if new is old:
        return
    for name in (plan.name, *plan.aliases):
        set_module(model, name, new)
    if plan.kind in FLOAT_KINDS:  # a wrapped layer keeps its tensors
        trained.moved(old, new)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Makes that the module of that name."""
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)
