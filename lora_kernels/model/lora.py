"""Whole models: `add_lora` and what undoes, switches and reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._utils.errors import unknown_name
from .._utils.names import without_wrappers
from .._utils.progress import tracked
from ..layers.base import base_of
from ..layers.wrapper import LoRAWrapper
from .config import AdapterState, LoRAConfig
from .install import (
    Setting,
    adapted_layers,
    install,
    layers_with_names,
    leave_fast_path,
    put_back,
    untie_if_needed,
    unwrapped,
)
from .originals import OriginalWeights
from .plan import LayerPlan, check_norms, plan_layers, plan_starts, plan_states
from .report import LoRAReport, make_report
from .saved_modules import SavedTensors, extra_places, saved_places, trained_biases
from .selection import select_layers, with_task_head

_RECORD = "_lora_adapters"


class ModelAdapters:
    """What a model knows of its adapters, beside its layers: their configurations, which one is
    active, the tensors that are trained in full, and settings to put back at the end.
    """

    def __init__(self) -> None:
        self.configs: dict[str, LoRAConfig] = {}
        self.saved = SavedTensors()
        self.active = ""
        self.enabled = True
        self.settings: list[Setting] = []


def add_lora(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    adapter_name: str = "default",
    gradients: Mapping[str, Tensor] | None = None,
    original_weights: Mapping[str, Tensor] | str | Path | None = None,
    progress: bool = True,
) -> LoRAReport:
    """Adapts a model in place: its layers are replaced, its other parameters frozen.

    The model computes as before, but for rounding, and for starts that are left in on purpose. A
    second call with another `adapter_name` adds a further adapter over the same base; the new one
    is active.

    Args:
        model: any `nn.Module`; not wrapped by DDP, FSDP or `torch.compile` yet.
        config: `LoRAConfig()` if None.
        adapter_name: what `set_adapter` and `save_adapter` call it.
        gradients: {layer name: ∂loss/∂W [out, in]} for the starts that are made from them, as
            `capture_gradients` gives it.
        original_weights: of a quantised model, what it was quantised from, for LoftQ: a dict
            {name: W}, or the folder of its checkpoint, of which one tensor at a time is read.
        progress: whether a bar is shown, if standard error is a terminal.

    Returns:
        What was adapted, what was not and why; it prints well.

    Raises:
        ValueError: nothing to adapt, a name that is not there, a rank that is too large, a weight
            that cannot be started from (the layer is named). The model is unchanged then.
        TypeError: a target of the wrong kind.

    """
    began = time.perf_counter()
    config = LoRAConfig() if config is None else config
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    _check_model(model)
    record = _record(model) or ModelAdapters()
    _check_name(adapter_name, record)
    config = with_task_head(model, config)
    selection = select_layers(model, config)
    saved = saved_places(model, config.modules_to_save)
    originals = None if original_weights is None else OriginalWeights(original_weights)
    plans = plan_layers(model, selection, config, originals)
    _check_weights(plans, record)
    places = {**saved, **trained_biases(model, config.bias, plans)}
    with _all_or_nothing(model, record, adapter_name), torch.no_grad():
        plan_starts(plans, config.initializer, gradients, progress)
        record.saved.add(adapter_name, places)
        install(model, record.saved, plans, plans, adapter_name)
    _activate_new(model, record, config, adapter_name)
    return make_report(model, adapter_name, plans, selection, places, time.perf_counter() - began)


def merge_lora(
    model: nn.Module, adapter_name: str | None = None, *, dequantize: bool = False
) -> nn.Module:
    """Merges an adapter, the active one by default, into the weights, in place: the layers are
    what they were before `add_lora` again, with W + s·(BA − B₀A₀). Other adapters are dropped.

    Args:
        model: adapted by `add_lora` or `load_adapter`.
        adapter_name: which of several.
        dequantize: quantised layers have no room for the update; with True they become `nn.Linear`
            in floating point, without it they are an error.

    Raises:
        ValueError: no adapter of that name, or quantised layers. The model is unchanged then.

    """
    record = _needed_record(model)
    name = _known_name(record, adapter_name)
    wrapped = [
        path
        for path, layer in adapted_layers(model).items()
        if name in layer.adapter_names and isinstance(layer, LoRAWrapper)
    ]
    if wrapped and not dequantize:
        raise ValueError(
            f"{len(wrapped)} layers are quantised ({wrapped[0]} ...), and rounding would erase the "
            "update: load the base in floating point and load_adapter there, or pass "
            "dequantize=True to turn them into nn.Linear"
        )
    set_adapter(model, name)
    adapted = layers_with_names(model)
    while adapted:  # each W is freed once there is a merged one
        paths, layer = adapted.pop()
        plain = layer.to_linear() if name in layer.adapter_names else layer.restore_()
        put_back(model, paths, layer, plain)
    model.requires_grad_(False)
    untie_if_needed(model)
    _forget(model, record)
    return model


def unload_lora(model: nn.Module) -> nn.Module:
    """Takes all adapters off, in place: the model is its base again, frozen as it is.

    Bit for bit, but for layers that absorbed a start: these to one rounding of their dtype.
    """
    record = _needed_record(model)
    record.saved.activate(None)
    for paths, layer in layers_with_names(model):
        put_back(model, paths, layer, layer.restore_())
    _forget(model, record)
    return model


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Makes that adapter the one that counts and trains; layers it does not have are the base."""
    record = _needed_record(model)
    record.active = _known_name(record, adapter_name)
    record.enabled = True
    _apply(model, record)
    for layer in adapted_layers(model).values():
        for name in layer.adapter_names:
            layer.adapter(name).set_trainable(name == adapter_name)
    for name in record.configs:
        record.saved.set_trainable(name, name == adapter_name)


class disable_adapters(AbstractContextManager["disable_adapters"]):  # noqa: N801  (used as a function, as torch.no_grad)
    """The model is its base from here on, or within `with disable_adapters(model):`.

    Bit for bit, but for layers that absorbed a start: these to one rounding of their dtype, and
    with a pass over W for each call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        record = _needed_record(model)
        self._before = record.enabled
        record.enabled = False
        _apply(model, record)

    def __exit__(self, *error: object) -> None:
        record = _record(self._model)
        if record is None:  # merged or unloaded within the block
            return
        record.enabled = self._before
        _apply(self._model, record)


def enable_adapters(model: nn.Module) -> None:
    """The active adapter counts again."""
    record = _needed_record(model)
    record.enabled = True
    _apply(model, record)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the model's adapters, in the order in which they came."""
    record = _record(model)
    return [] if record is None else list(record.configs)


def adapter_state(model: nn.Module, adapter_name: str | None = None) -> AdapterState:
    """A copy of an adapter, the active one by default, on the CPU."""
    model = unwrapped(model)
    record = _needed_record(model)
    name = _known_name(record, adapter_name)
    layers = {
        without_wrappers(path): layer.adapter(name).layer_state()
        for path, layer in adapted_layers(model).items()
        if name in layer.adapter_names
    }
    extra = {
        without_wrappers(path): tensor.detach().to("cpu", copy=True)
        for path, tensor in record.saved.tensors(name).items()
    }
    config = getattr(model, "config", None)
    base = getattr(model, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return AdapterState(record.configs[name], layers, extra, base or None)


def apply_state(
    model: nn.Module,
    state: AdapterState,
    *,
    adapter_name: str = "default",
    is_trainable: bool = True,
    progress: bool = True,
) -> LoRAReport:
    """Puts an adapter onto a base, as `add_lora` had: absorbed starts are absorbed again, where the
    base can be rewritten and has no other adapter, and subtracted by the layers elsewhere.

    Raises:
        ValueError: a layer or a tensor of the adapter is not in the model, or has another shape
            there. The model is unchanged then.

    """
    began = time.perf_counter()
    _check_model(model)
    record = _record(model) or ModelAdapters()
    _check_name(adapter_name, record)
    plans, selection = plan_states(model, state)
    _check_weights(plans, record)
    places = extra_places(model, state)
    with _all_or_nothing(model, record, adapter_name), torch.no_grad():
        check_norms(plans)
        record.saved.add(adapter_name, places, state.extra)
        install(model, record.saved, plans, tracked(plans, "loading", progress), adapter_name)
    _activate_new(model, record, state.config, adapter_name)
    if not is_trainable:
        for layer in adapted_layers(model).values():
            if adapter_name in layer.adapter_names:
                layer.adapter(adapter_name).set_trainable(False)
        record.saved.set_trainable(adapter_name, False)
    return make_report(model, adapter_name, plans, selection, places, time.perf_counter() - began)


@contextmanager
def _all_or_nothing(model: nn.Module, record: ModelAdapters, adapter_name: str) -> Iterator[None]:
    """The originals of what other adapters train in full are in their places. After an error the
    record is what it was.
    """
    record.saved.activate(None)
    try:
        yield
    except BaseException:
        record.saved.remove(adapter_name)
        _apply(model, record)
        raise


def _activate_new(
    model: nn.Module, record: ModelAdapters, config: LoRAConfig, adapter_name: str
) -> None:
    if not record.configs:
        _freeze_base(model, record)
        setattr(unwrapped(model), _RECORD, record)
    record.settings += leave_fast_path(model)
    record.configs[adapter_name] = config
    set_adapter(model, adapter_name)


def _freeze_base(model: nn.Module, record: ModelAdapters) -> None:
    own = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)


def _apply(model: nn.Module, record: ModelAdapters) -> None:
    """Switches layers and trained tensors to what the record says."""
    for layer in adapted_layers(model).values():
        has_it = record.active in layer.adapter_names
        if has_it:
            layer.active_adapter = record.active
        layer.adapter_enabled = record.enabled and has_it
    record.saved.activate(record.active if record.enabled else None)


def _check_weights(plans: Sequence[LayerPlan], record: ModelAdapters) -> None:
    """Raises ValueError for a layer whose weight another adapter trains in full."""
    for plan in plans:
        owner = record.saved.owner(plan.base.module, "weight")
        if owner is not None:
            raise ValueError(
                f"{plan.name} is trained in full by adapter {owner!r} (modules_to_save): leave it "
                "out with exclude_modules; a layer is adapted by some adapters or trained in full "
                "by others"
            )


def _forget(model: nn.Module, record: ModelAdapters) -> None:
    for module, name, value in record.settings:
        setattr(module, name, value)
    delattr(unwrapped(model), _RECORD)


def _record(model: nn.Module) -> ModelAdapters | None:
    return vars(unwrapped(model)).get(_RECORD)


def _needed_record(model: nn.Module) -> ModelAdapters:
    record = _record(model)
    if record is None:
        raise ValueError(
            f"this {type(model).__name__} has no adapters: add_lora or load_adapter first"
        )
    return record


def _known_name(record: ModelAdapters, adapter_name: str | None) -> str:
    if adapter_name is None:
        return record.active
    if adapter_name not in record.configs:
        raise unknown_name("adapter", adapter_name, list(record.configs))
    return adapter_name


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if hasattr(model, "peft_config"):
        raise TypeError(
            "this model has PEFT's adapters: lora_kernels.peft.initialize gives them our starts"
        )
    if unwrapped(model) is not model:
        raise TypeError(f"adapt the model before it is wrapped in {type(model).__name__}")
    if base_of(model) is not None:
        raise TypeError(f"the model is a single {type(model).__name__}: use LoRALinear.from_linear")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("the model has lazy layers without a shape: call it once first")
    if _record(model) is None and (strange := next(iter(adapted_layers(model)), None)):
        raise ValueError(
            f"{strange} is adapted already, on its own or as part of another model than this "
            f"{type(model).__name__}: add further adapters there, or take that one off"
        )


def _check_name(adapter_name: str, record: ModelAdapters) -> None:
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be a string, got {type(adapter_name).__name__}")
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(
            f"adapter_name cannot be {adapter_name!r}: it becomes part of tensors' names"
        )
    if adapter_name in record.configs:
        raise ValueError(
            f"the model has an adapter {adapter_name!r} already: give another adapter_name, or "
            "unload_lora first"
        )
