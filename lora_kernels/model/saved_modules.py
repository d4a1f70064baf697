"""Tensors of the base that an adapter trains in full: those of `modules_to_save`, and biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .._utils.names import nearest, without_wrappers
from ..layers.adapted import AdaptedLayer
from ..layers.base import base_of
from .config import AdapterState
from .plan import LayerPlan
from .selection import match_modules

Place = tuple[nn.Module, str]  # whose tensor it is, and what it is called there


class SavedTensors:
    """Copies of some of a model's tensors for each adapter, and the originals, which never change.

    The module structure stays as it is: the tensors of the active adapter, or the originals, are
    what the modules hold. A tied weight is tied again where the originals are back.
    """

    def __init__(self) -> None:
        self._places: dict[str, Place] = {}
        self._base: dict[str, Tensor] = {}
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._dtypes: dict[str, torch.dtype] = {}  # of what the modules were given
        self._active: str | None = None

    def add(
        self, adapter: str, places: Mapping[str, Place], values: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copies for an adapter: of the originals, which are in their places, or of `values`."""
        copies = {}
        for name, (module, key) in places.items():
            base = getattr(module, key)
            value = base if values is None else values[name]
            copy = value.detach().to(base.device, base.dtype, copy=True)
            is_parameter = isinstance(base, nn.Parameter)
            copies[name] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
        self._collect()
        for name, (module, key) in places.items():
            self._places.setdefault(name, (module, key))
            self._base.setdefault(name, getattr(module, key))
            self._dtypes.setdefault(name, self._base[name].dtype)
        self._copies[adapter] = copies

    def activate(self, adapter: str | None) -> None:
        """Puts that adapter's tensors into the modules; None: the originals."""
        self._collect()
        own = {} if adapter is None else self._copies.get(adapter, {})
        for name, (module, key) in self._places.items():
            current, wanted = getattr(module, key), own.get(name, self._base[name])
            if wanted is not current:
                # What is aside does not follow the model from device to device.
                wanted.data = wanted.data.to(current.device)
                setattr(module, key, wanted)
                self._dtypes[name] = wanted.dtype
        self._active = adapter

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """`requires_grad` of that adapter's parameters."""
        self._collect()
        for tensor in self._copies.get(adapter, {}).values():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.requires_grad_(trainable)

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """That adapter's tensors by name."""
        self._collect()
        return dict(self._copies.get(adapter, {}))

    def remove(self, adapter: str) -> None:
        """Forgets an adapter that is not active."""
        self._copies.pop(adapter, None)

    def moved(self, old: nn.Module, new: nn.Module) -> None:
        """Says that `new` has the tensors of `old` from now on."""
        self._places = {n: (new if m is old else m, key) for n, (m, key) in self._places.items()}

    def owner(self, module: nn.Module, key: str) -> str | None:
        """The first adapter that trains this tensor in full."""
        names = {name for name, (m, k) in self._places.items() if m is module and k == key}
        return next((a for a, copies in self._copies.items() if names & copies.keys()), None)

    def _collect(self) -> None:
        """Takes note of what the modules hold: `.to(dtype)` puts other buffers there, and
        `load_state_dict(assign=True)` other parameters. What is aside follows the model to another
        dtype, but float32, which trainers give to what they train alone.
        """
        own = {} if self._active is None else self._copies.get(self._active, {})
        for name, (module, key) in self._places.items():
            current = getattr(module, key)
            (own if name in own else self._base)[name] = current
            if current.dtype not in (self._dtypes[name], torch.float32):
                for tensors in (self._base, *self._copies.values()):
                    if name in tensors:
                        tensors[name].data = tensors[name].data.to(current.dtype)
            self._dtypes[name] = current.dtype


def module_places(name: str, module: nn.Module) -> dict[str, Place]:
    """Where the parameters and buffers of a module lie, by the names in its model's state_dict."""
    # Some wrappers keep their names out of it.
    saved = {without_wrappers(key) for key in module.state_dict()}
    places: dict[str, Place] = {}
    for prefix, part in module.named_modules():
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                path = f"{prefix}.{key}" if prefix else key
                if tensor is not None and without_wrappers(path) in saved:
                    places[f"{name}.{path}" if name else path] = (part, key)
    return places


def bias_places(modules: Mapping[str, nn.Module]) -> dict[str, Place]:
    """Where the biases of these modules lie: parameters whose name says so, as in PEFT."""
    places: dict[str, Place] = {}
    for name, module in modules.items():
        for key, tensor in module._parameters.items():
            if tensor is not None and "bias" in key and "lora_" not in key:
                places[f"{name}.{key}" if name else key] = (module, key)
    return places


def saved_places(model: nn.Module, modules_to_save: Sequence[str] | None) -> dict[str, Place]:
    """Where the tensors of `modules_to_save` lie."""
    if not modules_to_save:
        return {}
    modules = {name: module for name, module in model.named_modules() if name}
    places: dict[str, Place] = {}
    for name, module in match_modules(modules, modules_to_save, "modules_to_save").items():
        for path, part in module.named_modules(prefix=name):
            _check_saved(path, part)
        places |= module_places(name, module)
    if not places:
        raise ValueError(f"modules_to_save names {', '.join(modules_to_save)}, without a tensor")
    return places


def _check_saved(name: str, module: nn.Module) -> None:
    """Raises ValueError for a module whose tensors cannot be trained in full."""
    if isinstance(module, AdaptedLayer):
        raise ValueError(
            f"modules_to_save: {name} has adapter {module.adapter_names[0]!r}; a layer is adapted "
            "by some adapters or trained in full by others"
        )
    base = base_of(module)
    if base is not None and not base.rewritable:
        raise ValueError(
            f"modules_to_save: {name} is quantised ({base.kind}) and cannot be trained"
        )


def trained_biases(model: nn.Module, bias: str, plans: Sequence[LayerPlan]) -> dict[str, Place]:
    """Where the biases that train lie, by their names in the base model."""
    if bias == "none":
        return {}
    modules = dict(model.named_modules())
    if bias == "lora_only":
        names = {plan.name for plan in plans}
        names |= {f"{name}.base_layer" for name in names}
        modules = {n: m for n, m in modules.items() if n in names}
    places = bias_places(modules)
    return {_base_name(name): place for name, place in places.items()}


def _base_name(name: str) -> str:
    """What a tensor of a wrapped layer was called before."""
    return name.replace(".base_layer.", ".")


def extra_places(model: nn.Module, state: AdapterState) -> dict[str, Place]:
    """Where the tensors that an adapter brings in full lie.

    Raises:
        ValueError: the model has no such tensor, or one of another shape, or has adapted its layer.

    """
    found: dict[str, Place] = {}
    if not state.extra:
        return found
    known = {
        without_wrappers(_base_name(name)): place
        for name, place in module_places("", model).items()
    }
    for name, value in state.extra.items():
        if name not in known:
            raise ValueError(
                f"the adapter contains a tensor {name!r} that this model does not have"
                f"{nearest(name, known)}"
            )
        module, key = known[name]
        if isinstance(module, AdaptedLayer) and key != "bias":
            raise ValueError(
                f"the adapter trains {name} in full, but adapter {module.adapter_names[0]!r} has "
                "adapted that layer: unload_lora first"
            )
        shape = getattr(module, key).shape
        if shape != value.shape:
            raise ValueError(
                f"the adapter's {name} has shape {list(value.shape)}, this model's {list(shape)}"
            )
        found[name] = known[name]
    return found
