"""Where the tensors of a model lie that an adapter trains in full."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .adapted import AdaptedLayer
from .bases import kind_of
from .plan import FLOAT_KINDS, LayerPlan
from .selection import match_modules
from .state import AdapterState
from .targets import nearest, without_wrappers
from .trained import Slot, bias_slots, module_slots


def saved_slots(model: nn.Module, modules_to_save: Sequence[str] | None) -> dict[str, Slot]:
    """Where the tensors of `modules_to_save` lie."""
    if not modules_to_save:
        return {}
    modules = {name: module for name, module in model.named_modules() if name}
    slots: dict[str, Slot] = {}
    for name, module in match_modules(modules, modules_to_save, "modules_to_save").items():
        for path, part in module.named_modules(prefix=name):
            _check_saved(path, part)
        slots |= module_slots(name, module)
    if not slots:
        raise ValueError(f"modules_to_save names {', '.join(modules_to_save)}, without a tensor")
    return slots


def _check_saved(name: str, module: nn.Module) -> None:
    """Raises ValueError for a module whose tensors cannot be trained in full."""
    if isinstance(module, AdaptedLayer):
        raise ValueError(
            f"modules_to_save: {name} has adapter {module.adapter_name!r}; a layer is adapted by "
            "some adapters or trained in full by others"
        )
    kind = kind_of(module)
    if kind is not None and kind not in FLOAT_KINDS:
        raise ValueError(f"modules_to_save: {name} is quantised ({kind}) and cannot be trained")


def trained_biases(model: nn.Module, bias: str, plans: Sequence[LayerPlan]) -> dict[str, Slot]:
    """Where the biases that train lie, by their names in the base model."""
    if bias == "none":
        return {}
    modules = dict(model.named_modules())
    if bias == "lora_only":
        names = {plan.name for plan in plans}
        names |= {f"{name}.base_layer" for name in names}
        modules = {n: m for n, m in modules.items() if n in names}
    slots = bias_slots(modules)
    return {_base_name(name): slot for name, slot in slots.items()}


def _base_name(name: str) -> str:
    """What a tensor of a wrapped layer was called before."""
    return name.replace(".base_layer.", ".")


def extra_slots(model: nn.Module, state: AdapterState) -> dict[str, Slot]:
    """Where the tensors that an adapter brings in full lie.

    Raises:
        ValueError: the model has no such tensor, or one of another shape, or has adapted its layer.

    """
    slots: dict[str, Slot] = {}
    if not state.extra:
        return slots
    places = {
        without_wrappers(_base_name(name)): slot for name, slot in module_slots("", model).items()
    }
    for name, value in state.extra.items():
        if name not in places:
            raise ValueError(
                f"the adapter has a tensor {name!r} that this model has not{nearest(name, places)}"
            )
        module, key = places[name]
        if isinstance(module, AdaptedLayer) and key != "bias":
            raise ValueError(
                f"the adapter trains {name} in full, but adapter {module.adapter_name!r} has "
                "adapted that layer: unload_lora first"
            )
        shape = getattr(module, key).shape
        if shape != value.shape:
            raise ValueError(
                f"the adapter's {name} has shape {list(value.shape)}, this model's {list(shape)}"
            )
        slots[name] = places[name]
    return slots
