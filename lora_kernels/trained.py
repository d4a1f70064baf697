"""Tensors of the base that an adapter trains in full: those of `modules_to_save`, and biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from .targets import without_wrappers

Slot = tuple[dict[str, Tensor], str]


class TrainedTensors:
    """Copies of some of a model's tensors for each adapter, and the originals, which never change.

    The module structure stays as it is: the tensors of the active adapter, or the originals, are
    what the modules hold. A tied weight is tied again where the originals are back.
    """

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._base: dict[str, Tensor] = {}
        self._copies: dict[str, dict[str, Tensor]] = {}

    def add(
        self, adapter: str, slots: Mapping[str, Slot], values: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copies for an adapter: of the originals, or of `values`."""
        copies = {}
        for name, (holder, key) in slots.items():
            self._slots.setdefault(name, (holder, key))
            base = self._base.setdefault(name, holder[key])
            value = base if values is None else values[name]
            copy = value.detach().to(base.device, base.dtype, copy=True)
            copies[name] = nn.Parameter(copy) if isinstance(base, nn.Parameter) else copy
        self._copies[adapter] = copies

    def activate(self, adapter: str | None) -> None:
        """Puts that adapter's tensors into the modules; None: the originals."""
        own = {} if adapter is None else self._copies.get(adapter, {})
        for name, (holder, key) in self._slots.items():
            current, wanted = holder[key], own.get(name, self._base[name])
            if wanted is not current:
                # What is aside does not follow the model from device to device.
                wanted.data = wanted.data.to(current.device)
                holder[key] = wanted

    def set_trainable(self, adapter: str, trainable: bool) -> None:
        """`requires_grad` of that adapter's parameters."""
        for tensor in self._copies.get(adapter, {}).values():
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                tensor.requires_grad_(trainable)

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """That adapter's tensors by name."""
        return dict(self._copies.get(adapter, {}))

    def remove(self, adapter: str) -> None:
        """Forgets an adapter that is not active."""
        self._copies.pop(adapter, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)


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
                    slots[f"{name}.{path}" if name else path] = (holder, key)
    return slots


def bias_slots(modules: Mapping[str, nn.Module]) -> dict[str, Slot]:
    """Where the biases of these modules lie: parameters whose name says so, as in PEFT."""
    slots: dict[str, Slot] = {}
    for name, module in modules.items():
        for key, tensor in module._parameters.items():
            if tensor is not None and "bias" in key and "lora_" not in key:
                slots[f"{name}.{key}" if name else key] = (module._parameters, key)
    return slots
