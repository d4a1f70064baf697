"""Tensors of the base that an adapter trains in full: those of `modules_to_save`, and biases."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .targets import without_wrappers

Slot = tuple[nn.Module, str]  # whose tensor it is, and what it is called there


class TrainedTensors:
    """Copies of some of a model's tensors for each adapter, and the originals, which never change.

    The module structure stays as it is: the tensors of the active adapter, or the originals, are
    what the modules hold. A tied weight is tied again where the originals are back.
    """

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._base: dict[str, Tensor] = {}
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._dtypes: dict[str, torch.dtype] = {}  # of what the modules were given
        self._active: str | None = None

    def add(
        self, adapter: str, slots: Mapping[str, Slot], values: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copies for an adapter: of the originals, which are in their places, or of `values`."""
        copies = {}
        for name, (module, key) in slots.items():
            base = getattr(module, key)
            value = base if values is None else values[name]
            copy = value.detach().to(base.device, base.dtype, copy=True)
            is_parameter = isinstance(base, nn.Parameter)
            copies[name] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
        self._collect()
        for name, (module, key) in slots.items():
            self._slots.setdefault(name, (module, key))
            self._base.setdefault(name, getattr(module, key))
            self._dtypes.setdefault(name, self._base[name].dtype)
        self._copies[adapter] = copies

    def activate(self, adapter: str | None) -> None:
        """Puts that adapter's tensors into the modules; None: the originals."""
        self._collect()
        own = self._copies.get(adapter, {})
        for name, (module, key) in self._slots.items():
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
        self._slots = {n: (new if m is old else m, key) for n, (m, key) in self._slots.items()}

    def owner(self, module: nn.Module, key: str) -> str | None:
        """The first adapter that trains this tensor in full."""
        names = {name for name, (m, k) in self._slots.items() if m is module and k == key}
        return next((a for a, copies in self._copies.items() if names & copies.keys()), None)

    def _collect(self) -> None:
        """Takes note of what the modules hold: `.to(dtype)` puts other buffers there, and
        `load_state_dict(assign=True)` other parameters. What is aside follows the model to another
        dtype, but float32, which trainers give to what they train alone.
        """
        own = self._copies.get(self._active, {})
        for name, (module, key) in self._slots.items():
            current = getattr(module, key)
            (own if name in own else self._base)[name] = current
            if current.dtype not in (self._dtypes[name], torch.float32):
                for tensors in (self._base, *self._copies.values()):
                    if name in tensors:
                        tensors[name].data = tensors[name].data.to(current.dtype)
            self._dtypes[name] = current.dtype


def module_slots(name: str, module: nn.Module) -> dict[str, Slot]:
    """Where the parameters and buffers of a module lie, by the names in its model's state_dict."""
    # Some wrappers keep their names out of it.
    saved = {without_wrappers(key) for key in module.state_dict()}
    slots: dict[str, Slot] = {}
    for prefix, part in module.named_modules():
        for holder in (part._parameters, part._buffers):
            for key, tensor in holder.items():
                path = f"{prefix}.{key}" if prefix else key
                if tensor is not None and without_wrappers(path) in saved:
                    slots[f"{name}.{path}" if name else path] = (part, key)
    return slots


def bias_slots(modules: Mapping[str, nn.Module]) -> dict[str, Slot]:
    """Where the biases of these modules lie: parameters whose name says so, as in PEFT."""
    slots: dict[str, Slot] = {}
    for name, module in modules.items():
        for key, tensor in module._parameters.items():
            if tensor is not None and "bias" in key and "lora_" not in key:
                slots[f"{name}.{key}" if name else key] = (module, key)
    return slots
