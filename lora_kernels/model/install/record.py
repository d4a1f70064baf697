"""`ModelAdapters`: a model's record of its adapters, beside the factors in its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.parameter import is_lazy

from ..._utils.checks import factor_dtype
from ..._utils.errors import unknown_name
from ..._utils.names import without_wrappers
from ...layers.adapter import Adapter
from ...layers.base import base_of
from ...layers.dequantize import check_cast
from ..config import LoRAConfig, Replication
from ..plan import LayerPlan
from ..starts import WAITS, WaitingAdapter, naming
from .blocks import RepeatedBlocks
from .layers import Setting, adapted_layers, disable_fast_path, unwrapped
from .saved_modules import SavedTensors, copy_dtype
from .sharded.deepspeed import refuse_initialized, refuse_within_init
from .sharded.fsdp import check_one_dtype, reshard, sync_trainable
from .sharded.placing import check_forwards

_RECORD = "_lora_adapters"


class ModelAdapters:
    """The adapters' data that belong to the whole model, not to a layer: their configurations, the
    active adapter's name, the tensors trained in full, and settings to restore on unloading.
    """

    def __init__(self) -> None:
        self.configs: dict[str, LoRAConfig] = {}
        self.saved = SavedTensors()
        # For each adapter {weight: the tokens whose rows the adapter has, or None if it is tied}.
        self.tokens: dict[str, dict[str, tuple[int, ...] | None]] = {}
        self.active = ""
        self.enabled = True
        self.settings: list[Setting] = []
        self.blocks: RepeatedBlocks | None = None  # of PEFT's layer_replication

    @property
    def replication(self) -> Replication:
        """How the model's blocks are repeated."""
        return () if self.blocks is None else self.blocks.replication


def adapters_of(model: nn.Module, adapter_name: str) -> dict[str, Adapter]:
    """The modules of an adapter, by the layers' names in the base model."""
    return {
        without_wrappers(path): layer.adapter(adapter_name)
        for path, layer in adapted_layers(model).items()
        if adapter_name in layer.adapter_names
    }


@contextmanager
def all_or_nothing(model: nn.Module, record: ModelAdapters, adapter_name: str) -> Iterator[None]:
    """Inside the context, the modules hold the original tensors, not another adapter's trained
    copies. After an error the record is restored.
    """
    record.saved.activate(None)
    try:
        yield
    except BaseException:
        record.saved.remove(adapter_name)
        record.tokens.pop(adapter_name, None)
        apply(model, record, enabled=record.enabled)
        raise


def activate_new(
    model: nn.Module,
    record: ModelAdapters,
    config: LoRAConfig,
    adapter_name: str,
    trains: bool = True,
) -> None:
    """Adds a new adapter, whose layers are installed, to the record and activates it."""
    if not record.configs:
        _freeze_base(model, record)
        setattr(unwrapped(model), _RECORD, record)
    record.settings += disable_fast_path(model)
    record.configs[adapter_name] = config
    switch(model, record, adapter_name, trains)


def switch(model: nn.Module, record: ModelAdapters, adapter_name: str, trains: bool = True) -> None:
    """Makes an adapter the one that is used and, unless `trains` is False, that trains."""
    apply(model, record, adapter_name)
    for layer in adapted_layers(model).values():
        for name in layer.adapter_names:
            layer.adapter(name).set_trainable(trains and name == adapter_name)
    for name in record.configs:
        record.saved.set_trainable(name, trains and name == adapter_name)
    sync_trainable(model)


def _freeze_base(model: nn.Module, record: ModelAdapters) -> None:
    own = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)


def apply(
    model: nn.Module, record: ModelAdapters, active: str | None = None, enabled: bool = True
) -> None:
    """Activates an adapter (by default the record's active one) in all layers, with its tensors
    that are trained in full. If the tensors cannot be exchanged, nothing changes.
    """
    active = record.active if active is None else active
    exchanges = bool(record.saved.names)
    if exchanges:
        reshard(model)  # between two forwards, FSDP2's modules may hold gathered tensors
    record.saved.activate(active if enabled else None)
    if exchanges:
        sync_trainable(model, mixed=True)
    record.active, record.enabled = active, enabled
    for layer in adapted_layers(model).values():
        has_it = record.active in layer.adapter_names
        if has_it:
            layer.active_adapter = record.active
        layer.adapter_enabled = record.enabled and has_it


def check_weights(model: nn.Module, plans: Sequence[LayerPlan], record: ModelAdapters) -> None:
    """Raises ValueError for a layer whose weight is trained in full by another adapter, is stored
    in float8 and not cast for the forward, or is sharded in a way that its forward cannot support.
    """
    for plan in plans:
        if plan.base.kind == "float8" and not _is_in_hooked(model, plan.name):
            with naming(plan.name):
                check_cast(plan.base.layer)
        owner = record.saved.owner(*plan.base.place)
        if owner is not None:
            raise ValueError(
                f"{plan.name} is trained in full by adapter {owner!r} (modules_to_save): leave it "
                "out with exclude_modules; a layer is adapted by some adapters or trained in full "
                "by others"
            )
    check_forwards(model, plans)


def check_dtypes(
    model: nn.Module, plans: Sequence[LayerPlan], places: Mapping[str, tuple[nn.Module, str]]
) -> None:
    """Raises ValueError if FSDP2 cannot train the factors of these layers beside the tensors at
    these places, which are trained in full.
    """
    trained = {place: (name, copy_dtype(getattr(*place))) for name, place in places.items()}
    for plan in plans:
        trained[plan.base.place] = (f"the factors of {plan.name}", factor_dtype(plan.base.dtype))
    check_one_dtype(model, trained)


def _is_in_hooked(model: nn.Module, name: str) -> bool:
    """Whether a module around the layer `name` has hooks, which may cast its layers."""
    parts = name.split(".")[:-1]
    around = [".".join(parts[:end]) for end in range(len(parts) + 1)]
    return any(model.get_submodule(path)._forward_pre_hooks for path in around)


def forget(model: nn.Module, record: ModelAdapters) -> None:
    """Removes the record from a model without adapters, and restores its settings."""
    for module, name, value in record.settings:
        setattr(module, name, value)
    delattr(unwrapped(model), _RECORD)


def record_of(model: nn.Module) -> ModelAdapters | None:
    """The record of a model; None if it has no adapters."""
    return vars(unwrapped(model)).get(_RECORD)


def needed_record(model: nn.Module) -> ModelAdapters:
    """The record of a model; raises ValueError if it has no adapters."""
    record = record_of(model)
    if record is None:
        raise ValueError(
            f"this {type(model).__name__} has no adapters: add_lora or load_adapter first"
        )
    return record


def known_name(record: ModelAdapters, adapter_name: str | None) -> str:
    """The name of an adapter, the active one if None; raises ValueError if there is none."""
    if adapter_name is None:
        return record.active
    if adapter_name not in record.configs:
        raise unknown_name("adapter", adapter_name, list(record.configs))
    return adapter_name


def waiting_names(model: nn.Module, record: ModelAdapters) -> list[str]:
    """The adapters that wait for their start in one of their layers."""
    return [name for name in record.configs if waiting_layers(model, name)]


def waiting_layers(model: nn.Module, adapter_name: str) -> dict[str, WaitingAdapter]:
    """The modules of an adapter that wait for their start, by the layers' names."""
    found = adapters_of(model, adapter_name).items()
    return {path: adapter for path, adapter in found if isinstance(adapter, WaitingAdapter)}


def check_absorbed(model: nn.Module, record: ModelAdapters) -> None:
    """Raises ValueError if an adapter still has to absorb its start: no other adapter can be added
    before that.
    """
    for name in waiting_names(model, record):
        if any(waiting.residual == "absorb" for waiting in waiting_layers(model, name).values()):
            raise ValueError(f"adapter {name!r} {WAITS}, before another one is added")


def check_started(model: nn.Module, adapter_name: str) -> None:
    """Raises ValueError if the adapter waits for its start."""
    if waiting_layers(model, adapter_name):
        raise ValueError(f"adapter {adapter_name!r} {WAITS}")


def check_model(model: nn.Module) -> None:
    """Raises TypeError or ValueError if adapters cannot be added to the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if hasattr(model, "peft_config"):
        raise TypeError(
            "this model has PEFT's adapters: lora_kernels.peft.initialize gives them our starts"
        )
    if unwrapped(model) is not model:
        raise TypeError(f"adapt the model before it is wrapped in {type(model).__name__}")
    refuse_initialized(model)
    refuse_within_init()
    if base_of(model) is not None:
        hint = "use LoRALinear.from_linear"
        if isinstance(model, nn.Embedding):
            hint = "put it into a module that has a name for it"
        raise TypeError(f"the model is a single {type(model).__name__}: {hint}")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        raise ValueError("the model has lazy layers without a shape: call it once first")
    if record_of(model) is None and (strange := next(iter(adapted_layers(model)), None)):
        raise ValueError(
            f"{strange} is adapted already, on its own or as part of another model than this "
            f"{type(model).__name__}: add further adapters there, or remove that adapter first"
        )


def check_name(adapter_name: str, record: ModelAdapters) -> None:
    """Raises TypeError or ValueError if an adapter cannot have this name."""
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
