"""Replaces a model's layers by adapted ones, and restores all of them if an error occurs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...init.sharded.layout import is_sharded
from ...layers.adapted import AdaptedLayer, transplant
from ...layers.linear import AdaptedFloatLayer
from ..experts.module import remove_stack
from ..experts.stack import AdaptedStack
from ..plan import LayerPlan
from ..selection import input_embeddings, output_head
from ..starts import naming
from .saved_modules import SavedTensors
from .sharded.fsdp import leave
from .sharded.placing import place_factors
from .sharded.tensor_parallel import carry_over, rewrapped


def install(
    model: nn.Module,
    saved: SavedTensors,
    plans: Sequence[LayerPlan],
    tracked_plans: Iterable[LayerPlan],
    adapter_name: str,
) -> None:
    """Puts the adapted layers of `plans` into the model.

    `tracked_plans` yields the same plans, perhaps with a progress bar. Only a lack of memory, an
    interrupt, or a row whose norm is not finite can make this fail. Then all changes are undone; a
    weight from which s·B₀A₀ had been subtracted is restored to one rounding, and a base that LoftQ
    had rewritten stays quantized.
    """
    layers: list[AdaptedLayer] = []
    try:
        for plan in tracked_plans:
            # Wrappers around the forward of experts stay in place.
            around = rewrapped if plan.base.num_experts is None else nullcontext
            with around(plan.base.module):
                layers.append(plan.adapted(adapter_name))
            if plan.base.rewritable and plan.base.num_experts is None:
                carry_over(plan.base.module, layers[-1])
            plan.subtract_()
            plan.measure_(layers[-1].adapter(adapter_name))
            plan.start = plan.trained = None
            _put(model, saved, plan, plan.base.module, layers[-1])
        place_factors(model, layers, adapter_name)
    except BaseException:
        leave(model, [layer.adapter(adapter_name) for layer in layers])
        for plan, layer in zip(plans, layers, strict=False):
            with rewrapped(layer):
                plan.undo_(layer, adapter_name)
            if not isinstance(layer, AdaptedStack):
                _put(model, saved, plan, layer, plan.base.module)
            elif not plan.was_adapted:
                remove_stack(layer)
        raise
    for layer in layers:
        layer.freeze()


def _put(
    model: nn.Module, saved: SavedTensors, plan: LayerPlan, old: nn.Module, new: nn.Module
) -> None:
    """Replaces the layer `old` by `new` under all its names. Experts stay where they are."""
    if new is old or isinstance(new, AdaptedStack):
        return
    for name in (plan.name, *plan.aliases):
        set_module(model, name, new)
    if plan.base.rewritable:  # tensors stay in a layer inside a wrapper
        saved.moved(old, new)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Makes `module` the model's module of that name."""
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers with adapters, each by its first name in the model inside any wrappers."""
    found = unwrapped(model).named_modules()
    return {m.name_in(n): m for n, m in found if isinstance(m, AdaptedLayer)}


def layers_with_names(model: nn.Module) -> list[tuple[list[str], AdaptedLayer]]:
    """The adapted layers, each with all its names."""
    names: dict[int, tuple[list[str], AdaptedLayer]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, AdaptedLayer):
            names.setdefault(id(module), ([], module))[0].append(name)
    return list(names.values())


def merge_adapted(model: nn.Module, names: Sequence[str], layer: AdaptedLayer) -> None:
    """Replaces an adapted layer by a plain one with the active adapter merged."""
    if isinstance(layer, AdaptedStack):
        layer.merge_(shared=_is_shared(model, layer.weight))
        remove_stack(layer)
    else:
        shared = _is_shared(model, layer._parameters.get("weight"))
        with rewrapped(layer):
            plain = layer.merged(shared)
        _replace_adapted(model, names, layer, plain)


def check_mergeable(model: nn.Module, adapter_name: str) -> None:
    """Raises a ValueError that names the layer if an adapter cannot be merged into its weight."""
    for name, layer in adapted_layers(model).items():
        if adapter_name in layer.adapter_names and isinstance(layer, AdaptedFloatLayer):
            with naming(name):
                shared = _is_shared(model, layer._parameters.get("weight"))
                layer.check_mergeable(layer.adapter(adapter_name), shared)


def _is_shared(model: nn.Module, weight: nn.Parameter | None) -> bool:
    """Whether several modules of the model have this parameter."""
    if weight is None or not (is_sharded(weight) or weight.dim() == 3):
        return False  # a plain layer is replaced by a new one
    own = (p is weight for module in model.modules() for p in module._parameters.values())
    return sum(own) > 1


def restore_adapted(model: nn.Module, names: Sequence[str], layer: AdaptedLayer) -> None:
    """Replaces an adapted layer by the one that was adapted."""
    with rewrapped(layer):
        plain = layer.restore_()
    if isinstance(layer, AdaptedStack):
        remove_stack(layer)
    else:
        _replace_adapted(model, names, layer, plain)


def _replace_adapted(
    model: nn.Module, names: Sequence[str], layer: AdaptedLayer, plain: nn.Module
) -> None:
    """Replaces an adapted layer by a plain one under all its names; hooks move to the plain one. If
    the layer is sharded, both are the same module.
    """
    if plain is layer:
        return
    if isinstance(layer, AdaptedFloatLayer):
        transplant(layer, plain)
        carry_over(layer, plain)
    for name in names:
        set_module(model, name, plain)


def untie_if_needed(model: nn.Module) -> None:
    """Sets a Hugging Face model's `tie_word_embeddings` to False if its output head or one of its
    embeddings now has its own weight, which saving would otherwise drop.
    """
    model = unwrapped(model)
    config, head, embedding = getattr(model, "config", None), output_head(model), None
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return
    pairs: list[tuple[object, object]] = []
    if head is not None and (embedding := input_embeddings(model)) is not None:
        pairs.append((getattr(embedding, "weight", None), getattr(head, "weight", None)))
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    pairs += [(model.get_parameter(a), model.get_parameter(b)) for a, b in tied.items()]
    if any(one is not other for one, other in pairs):
        config.tie_word_embeddings = False
        _untie_others(model)


def _untie_others(model: nn.Module) -> None:
    """Gives modules that are still tied, such as BART's three embeddings, parameters of their own:
    with `tie_word_embeddings` False transformers ties nothing when it loads the model.
    """
    tied: Any = getattr(model, "all_tied_weights_keys", None) or {}
    for target in tied:
        owner, _, key = target.rpartition(".")
        module = model.get_submodule(owner)
        source = model.get_parameter(tied[target])
        if module._parameters.get(key) is source:
            setattr(module, key, nn.Parameter(source.detach().clone(), source.requires_grad))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of `torch.compile`, `DistributedDataParallel`,
    `FullyShardedDataParallel` and DeepSpeed's engine.
    """
    while True:
        if isinstance(model, DistributedDataParallel) or _is_wrapper(model):
            model = cast(nn.Module, model.module)
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _is_wrapper(model: nn.Module) -> bool:
    """Whether this is FSDP1's wrapper or DeepSpeed's; neither is imported for the answer."""
    return any(f"{cls.__module__}.{cls.__name__}" in _WRAPPERS for cls in type(model).__mro__)


_WRAPPERS = (
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "deepspeed.runtime.engine.DeepSpeedEngine",
)
Setting = tuple[nn.Module, str, object]


def disable_fast_path(model: nn.Module) -> list[Setting]:
    """Disables the fast path of torch's encoders that have adapted layers: in eval mode it reads
    the weights directly and bypasses the adapters. Returns the attributes' previous values.
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
