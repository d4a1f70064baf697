"""Puts planned layers into a model, and takes them out again if that cannot be finished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..layers.adapted import AdaptedLayer, transplant
from ..layers.linear import AdaptedFloatLayer
from .plan import LayerPlan
from .saved_modules import SavedTensors
from .selection import output_head


def install(
    model: nn.Module,
    saved: SavedTensors,
    plans: Sequence[LayerPlan],
    tracked_plans: Iterable[LayerPlan],
    adapter_name: str,
) -> None:
    """Puts the planned layers into the model. This fails only for lack of memory or by an
    interrupt; what was done is undone then, to one rounding where a start had been absorbed
    (LoftQ's base stays quantized).
    """
    layers: list[AdaptedLayer] = []
    try:
        for plan in tracked_plans:
            layers.append(plan.adapted(adapter_name))
            plan.subtract_()
            plan.start = plan.trained = None
            _put(model, saved, plan, plan.base.module, layers[-1])
    except BaseException:
        for plan, layer in zip(plans, layers, strict=False):
            plan.undo_(layer, adapter_name)
            _put(model, saved, plan, layer, plan.base.module)
        raise
    for layer in layers:
        layer.freeze()


def _put(
    model: nn.Module, saved: SavedTensors, plan: LayerPlan, old: nn.Module, new: nn.Module
) -> None:
    """Replaces one layer by another, under all its names."""
    if new is old:
        return
    for name in (plan.name, *plan.aliases):
        set_module(model, name, new)
    if plan.base.rewritable:  # a wrapped layer keeps its tensors
        saved.moved(old, new)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Makes that the module of that name."""
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers with adapters, by their names in the base model."""
    return {n: m for n, m in unwrapped(model).named_modules() if isinstance(m, AdaptedLayer)}


def layers_with_names(model: nn.Module) -> list[tuple[list[str], AdaptedLayer]]:
    """The adapted layers, each with all its names."""
    names: dict[int, tuple[list[str], AdaptedLayer]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLayer):
            names.setdefault(id(module), ([], module))[0].append(name)
    return list(names.values())


def put_back(model: nn.Module, names: Sequence[str], layer: AdaptedLayer, plain: nn.Module) -> None:
    """Replaces an adapted layer by a plain one, which takes over its hooks, under all its names."""
    if isinstance(layer, AdaptedFloatLayer):
        transplant(layer, plain)
    for name in names:
        set_module(model, name, plain)


def untie_if_needed(model: nn.Module) -> None:
    """Says in a Hugging Face model's config that its head has a weight of its own, if it has been
    given one: saving would drop it otherwise.
    """
    model = unwrapped(model)
    config, head = getattr(model, "config", None), output_head(model)
    embeddings = getattr(model, "get_input_embeddings", None)
    if config is None or head is None or embeddings is None:
        return
    if not getattr(config, "tie_word_embeddings", False):
        return
    if getattr(embeddings(), "weight", None) is not getattr(head, "weight", None):
        config.tie_word_embeddings = False


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s and DDP's wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


Setting = tuple[nn.Module, str, object]


def leave_fast_path(model: nn.Module) -> list[Setting]:
    """Keeps encoders with adapted layers off it, where in eval mode the adapters would not count:
    by the attributes that torch itself asks. Returns what they were.
    """
    changed: list[Setting] = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            name, off = "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder):
            name, off = "use_nested_tensor", False
        else:
            continue
        before = getattr(module, name)
        if before != off and any(isinstance(part, AdaptedLayer) for part in module.modules()):
            changed.append((module, name, before))
            setattr(module, name, off)
    return changed
