"""What all processes of a group must know or do alike: errors, seeds, results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def has_ranks() -> bool:
    """Whether this process is one of several of `torch.distributed`."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this process is the first of `torch.distributed`, or the only one."""
    import torch.distributed as dist

    return not has_ranks() or dist.get_rank() == 0


@contextmanager
def together(where: bool = True, what: str = "") -> Iterator[None]:
    """If a process raises inside the context, all processes raise the same error at its end instead
    of waiting for the process that failed. `where=False` turns this off. With `what`, the others
    raise RuntimeError, which says that `what` failed on some ranks.
    """
    if not (where and has_ranks()):
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    errors = from_every(_portable(failed))
    if failed is not None:
        raise failed
    others = [error for error in errors if error is not None]
    if others and what:
        raise RuntimeError(f"{what} failed on {len(others)} other rank(s)") from others[0]
    if others:
        raise others[0]


def from_every(value: T, group: Any = None) -> list[T]:
    """The value of every process of the group, in the order of ranks. Values must be picklable."""
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def shared(owner: int, make: Callable[[], T], group: Any = None) -> T:
    """The result of `make()`, run by rank `owner` of the group, on all its processes; if it raises,
    the error is raised on all.

    The result must be picklable, with its tensors on the CPU.
    """
    import torch.distributed as dist

    source = dist.get_global_rank(group, owner) if group is not None else owner
    message: list[Any] = [None, None]
    own: Exception | None = None
    if dist.get_rank() == source:
        try:
            message = [make(), None]
        except Exception as error:
            own, message = error, [None, _portable(error)]
    dist.broadcast_object_list(message, src=source, group=group)
    if own is not None:
        raise own
    if message[1] is not None:
        raise message[1]
    value: T = message[0]
    return value


@contextmanager
def agreed_randomness(device: torch.device) -> Iterator[None]:
    """Inside the context, torch's global generators for the CPU and the device have the first
    process's state on all processes: they draw what one process would draw. Afterwards, a generator
    whose state differed before gets its own state back.
    """
    before = random_states(device)
    first = shared(0, lambda: before)
    _set_random_states(first, device)
    try:
        yield
    finally:
        drawn = random_states(device)
        states = zip(before, first, drawn, strict=True)
        kept = [now if torch.equal(own, start) else own for own, start, now in states]
        _set_random_states(kept, device)


def random_states(device: torch.device) -> list[Tensor]:
    """The states of torch's global generators: the CPU's and, for a CUDA device, that device's."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def talking_device(device: torch.device, group: Any) -> torch.device:
    """The device over which the group sends tensors of `device`: NCCL does not accept CPU tensors,
    and a model's parameters may be offloaded to the CPU.
    """
    import torch.distributed as dist

    backend = str(dist.get_backend(group))
    if device.type == "cpu" and "nccl" in backend and "gloo" not in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def from_all(rows: Tensor, group: Any) -> Tensor:
    """The rows [n, ...] of every process of the group, in the order of its ranks [processes, n,
    ...], on the group's `talking_device`.
    """
    import torch.distributed as dist

    rows = rows.to(talking_device(rows.device, group)).contiguous()
    count = dist.get_world_size(group)
    found = rows.new_empty(count * len(rows), *rows.shape[1:])  # gloo takes no other shape
    # torch 2.13 has renamed it, and warns of the old name.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    gather(found, rows, group=group)
    return found.view(count, *rows.shape)


def _portable(error: Exception | None) -> Exception | None:
    """The error without its cause and traceback, so that another process can unpickle it."""
    if error is None:
        return None
    kinds = (ValueError, TypeError, FileNotFoundError, MemoryError, OSError)
    kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
    return kind(str(error))
