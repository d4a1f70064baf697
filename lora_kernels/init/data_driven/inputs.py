"""`InputSums`: sums over the inputs of modules, shared by all modules that get the same inputs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..._utils.checks import FLOATS, all_finite, factor_dtype, is_dtensor
from ..sharded.agree import from_every, has_ranks, talking_device
from ..sharded.layout import local_part
from .activations import Activations, ActivationSums


class _Input:
    """The sums over one input, and the modules that get it.

    A new input is added when all `members` have received it. Until then, `pending` holds its rows,
    and `waiting` the members that have not received it.
    """

    def __init__(self, member: nn.Module, sums: ActivationSums | None = None) -> None:
        self.members = {member}
        self.sums = sums
        self.events = 0
        self.pending: Tensor | None = None
        self.waiting: set[nn.Module] = set()
        self.last: tuple[weakref.ref[Tensor], int] | None = None

    def is_last(self, x: Tensor) -> bool:
        """Whether x is the most recent input and has not been changed in place since."""
        return self.last is not None and self.last[0]() is x and self.last[1] == _version(x)


class InputSums:
    """What `capture_activations` collects.

    Modules that were first called with the same tensor share an `_Input` until one of them gets
    another tensor, or none: that module then continues with a copy of the sums so far.

    Attributes:
        mask: the positions of the current batch that are included, bool [batch, length]; None: all.

    """

    def __init__(
        self,
        layers: Mapping[str, tuple[nn.Module, int]],
        sketch: int | None,
        device: torch.device | str | None,
    ) -> None:
        self.mask: Tensor | None = None
        self._layers, self._sketch, self._device = layers, sketch, device
        self._names: dict[nn.Module, str] = {}
        for name, (module, _) in layers.items():
            self._names.setdefault(module, name)
        self._inputs: dict[nn.Module, _Input] = {}
        self._recent: dict[int, _Input] = {}  # by the id of the tensor

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside the context, hooks add the inputs of all modules."""
        hooks = []
        try:
            for module in self._names:
                hooks.append(module.register_forward_pre_hook(self._take, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def settle(self) -> None:
        """Adds the pending rows. To be called after each batch."""
        for own in list(dict.fromkeys(self._inputs.values())):
            self._settle(own)
        self._recent.clear()

    def results(self) -> dict[str, Activations]:
        """The activations, by layer name.

        Raises:
            ValueError: a layer had no input, or its input holds NaN or Inf.

        """
        missed = [name for module, name in self._names.items() if not self._count(module)]
        if missed:
            raise ValueError(
                f"no input reached {len(missed)} of {len(self._names)} targets "
                f"({', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}): the model does not "
                "call them, or all their positions are masked; take other batches, or leave them "
                "out of targets"
            )
        found: dict[_Input, Activations] = {}
        for module, name in self._names.items():
            own = self._inputs[module]
            if own in found or own.sums is None:
                continue
            if not all_finite(own.sums.moments):
                raise ValueError(
                    f"the inputs of {name!r} hold NaN or Inf, or their squares overflow; float16 "
                    "overflows easily: run the model in bfloat16"
                )
            found[own] = own.sums.result()
        return {name: found[self._inputs[module]] for name, (module, _) in self._layers.items()}

    def _count(self, module: nn.Module) -> int:
        own = self._inputs.get(module)
        return 0 if own is None or own.sums is None else own.sums.count

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook, called with the inputs of a module."""
        name = self._names[module]
        x = self._checked(name, (*args, *kwargs.values()), self._layers[name][1])
        own = self._inputs.get(module)
        if own is None:
            shared = self._recent.get(id(x))
            if shared is not None and shared.is_last(x) and shared.events == 1:
                shared.members.add(module)
                self._inputs[module] = shared
                return
            own = self._inputs[module] = _Input(module)
        elif module in own.waiting and own.is_last(x):
            own.waiting.discard(module)
            if not own.waiting:
                self._flush(own)
            return
        else:
            self._settle(own)
            own = self._inputs[module]
        self._begin(own, module, x)

    def _begin(self, own: _Input, module: nn.Module, x: Tensor) -> None:
        """A new input, which this module is the first to receive."""
        rows = _rows(local_part(x), self.mask)
        if own.sums is None:
            device = rows.device if self._device is None else self._device
            dtype = factor_dtype(rows.dtype)
            own.sums = ActivationSums(rows.shape[1], dtype, device, self._sketch)
        own.events += 1
        own.last = weakref.ref(x), _version(x)
        self._recent[id(x)] = own
        own.waiting = own.members - {module}
        if own.waiting:  # a copy: x may change in place before all have received it
            own.pending = rows.to(own.sums.moments.dtype, copy=True)
        else:
            own.sums.add(rows)

    def _flush(self, own: _Input) -> None:
        if own.pending is not None and own.sums is not None:
            own.sums.add(own.pending)
        own.pending = None

    def _settle(self, own: _Input) -> None:
        """Adds the pending rows for members that received them; the others continue on a copy."""
        if own.waiting and own.sums is not None:
            left = _Input(next(iter(own.waiting)), own.sums.copy())
            left.members, left.events = set(own.waiting), 2  # nobody joins it
            own.members -= left.members
            own.waiting = set()
            for module in left.members:
                self._inputs[module] = left
        self._flush(own)

    def _checked(self, name: str, given: tuple[Any, ...], cols: int) -> Tensor:
        """The input of the layer `name`, whose weight has `cols` columns."""
        x = next((value for value in given if isinstance(value, Tensor)), None)
        if x is None:
            raise TypeError(f"{name!r} was called without a tensor: leave it out of targets")
        if x.is_meta:
            raise ValueError(f"the input of {name!r} is on the meta device: load the model first")
        if x.dtype not in FLOATS:
            raise TypeError(f"the input of {name!r} is {x.dtype}: expected floating point")
        placements = x.placements if is_dtensor(x) else ()  # type: ignore[attr-defined]
        is_whole = all(placement.is_replicate() for placement in placements)
        if not is_whole or x.shape[-1:] != (cols,):
            advice = "give the model batches that fit it"
            if has_ranks():
                advice = (
                    "tensor parallelism gives it a part of each input, so capture its activations "
                    "before the model is parallelized, or leave it out"
                )
            raise ValueError(
                f"the input of {name!r} is {'sharded' if not is_whole else list(x.shape)}, and its "
                f"weight has {cols} columns: {advice}"
            )
        return x

    def reduce(self, copies: int, device: torch.device) -> None:
        """Adds the sums of all processes, of which `copies` each have the same batches."""
        every = from_every(self._known())
        merged: dict[tuple[int, ...], _Input] = {}
        for module, name in self._names.items():
            key = tuple(own[name][0] for own in every)
            if key not in merged:
                dtype = next((own[name][2] for own in every if own[name][2] is not None), None)
                count = sum(own[name][1] for own in every) // copies
                if dtype is None:
                    continue
                sums = self._own_sums(module, name, dtype, device)
                _reduce(sums, count, copies, device)
                merged[key] = _Input(module, sums)
            self._inputs[module] = merged[key]

    def _known(self) -> dict[str, tuple[int, int, torch.dtype | None]]:
        """For each module: a number for its input, that input's number of rows, and the sums'
        dtype.
        """
        numbers = {own: k for k, own in enumerate(dict.fromkeys(self._inputs.values()))}
        known: dict[str, tuple[int, int, torch.dtype | None]] = {}
        for module, name in self._names.items():
            own = self._inputs.get(module)
            if own is None or own.sums is None:
                known[name] = (-1, 0, None)
            else:
                known[name] = (numbers[own], own.sums.count, own.sums.moments.dtype)
        return known

    def _own_sums(
        self, module: nn.Module, name: str, dtype: torch.dtype, device: torch.device
    ) -> ActivationSums:
        """A copy of this process's sums, or zeros if it has none."""
        found = self._inputs.get(module)
        if found is not None and found.sums is not None:
            return found.sums.copy()
        where = device if self._device is None else self._device
        return ActivationSums(self._layers[name][1], dtype, where, self._sketch)


def _version(x: Tensor) -> int:
    """A number that changes if x is changed in place; tensors of inference mode have none."""
    return 0 if x.is_inference() else x._version


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows [n, in] of x [..., in] that the mask includes."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is None:
        return rows
    is_masked = x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)
    return rows[mask.reshape(-1).to(x.device)] if is_masked else rows


def _reduce(sums: ActivationSums, count: int, copies: int, device: torch.device) -> None:
    """Adds the sums of all processes, in one collective; sketches are merged."""
    import torch.distributed as dist

    total = sums.moments.to(talking_device(device, None)).contiguous()
    dist.all_reduce(total)
    sums.moments, sums.count = total.div_(copies).to(sums.device), count
    if sums.sketch is None:
        return
    every = from_every((sums.sketch.rows().cpu(), sums.sketch.error))
    sums.sketch = sums.sketch.empty()
    for rows, error in every:
        sums.sketch.merge(rows.to(sums.device) * copies**-0.5, error / copies)
