"""Models whose weights only the first process has when their adapters start.

accelerate's FSDP with `cpu_ram_efficient_loading` copies the weights of the first process to the
others when it shards the model. Until then those of the others may be uninitialized or on meta.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ...init.sharded.agree import has_ranks, is_first_rank, shared
from ...init.sharded.owners import moved
from ...init.start import Start
from ...layers.base import BaseLayer

_VARIABLES = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
_CPU = torch.device("cpu")


def first_rank_loads(bases: Iterable[BaseLayer]) -> bool:
    """Whether accelerate will copy the first process's weights to all processes, as the environment
    says that `accelerate launch` and `TrainingArguments` set.
    """
    is_asked = all(_is_true(os.environ.get(name, "")) for name in _VARIABLES)
    return is_asked and has_ranks() and not any(base.sharded for base in bases)


def lacks_weights(bases: Iterable[BaseLayer]) -> bool:
    """Whether another process, and not this one, has the weights of the layers."""
    return first_rank_loads(bases) and not is_first_rank()


def starts_of_first_rank(
    make: Callable[[], Mapping[str, Start]], devices: Mapping[str, torch.device]
) -> dict[str, Start]:
    """The result of the first process's `make()`, on all processes; the starts are moved to these
    devices, or to the CPU instead of meta.

    Raises:
        Exception: what `make` raised, on all processes.

    """
    found = shared(0, lambda: {name: moved(start, _CPU) for name, start in make().items()})
    return {name: moved(start, loaded_device(devices[name])) for name, start in found.items()}


def load_from_first_rank(places: Mapping[str, tuple[nn.Module, str]]) -> None:
    """On all processes, gives the tensors at these places (module, name) the first one's values."""
    own = {name: getattr(module, key) for name, (module, key) in places.items()}
    values = shared(0, lambda: {name: tensor.detach().cpu() for name, tensor in own.items()})
    loaded: dict[int, Tensor] = {}  # by the tensor on meta: tied ones stay tied
    for name, (module, key) in places.items() if not is_first_rank() else ():
        if not own[name].is_meta:
            own[name].data.copy_(values[name])
            continue
        new = loaded.get(id(own[name]), values[name])
        if isinstance(own[name], nn.Parameter) and not isinstance(new, nn.Parameter):
            new = nn.Parameter(new, own[name].requires_grad)
        setattr(module, key, loaded.setdefault(id(own[name]), new))


def loaded_device(device: torch.device) -> torch.device:
    """The device, or the CPU for meta: where accelerate expects tensors that have values."""
    return _CPU if device.type == "meta" else device


def _is_true(text: str) -> bool:
    return text.lower() in ("1", "true", "yes", "y", "t", "on")
